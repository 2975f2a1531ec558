"""The prompts file holds what the pipeline's own encode_prompt returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiTTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from exporter.cli import main
from exporter.embed import EmbedOptions, embed, read_texts
from exporter.errors import InputError

TEXTS = ["A red Fox ", "the lazy dog sleeps under a tree"]
WIDTH, CLIP_TOKENS, T5_TOKENS = 16, 6, 9
WORDS = ["a", "red", "fox", "the", "lazy", "dog", "sleeps", "under", "tree"]


def t5(seed: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    """A tokenizer of whole words, of either case, and an encoder with random weights."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS), "▁A", "▁Fox"]
    tokenizer = T5Tokenizer(vocab=[(piece, -float(index)) for index, piece in enumerate(pieces)], extra_ids=0)
    torch.manual_seed(seed)
    config = T5Config(vocab_size=len(pieces), d_model=WIDTH, d_kv=4, d_ff=20, num_layers=2, num_heads=4)
    return tokenizer, T5EncoderModel(config).eval()


def bert() -> tuple[BertTokenizer, BertModel]:
    """The bilingual CLIP's kind of encoder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(words), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20
    )
    return tokenizer, BertModel(config).eval()


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2)


def pixart(pipeline: type) -> Any:
    tokenizer, encoder = t5(1)
    transformer = PixArtTransformer2DModel(
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        use_additional_conditions=False,
    )
    return pipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae(), transformer=transformer, scheduler=DDPMScheduler()
    )


def hunyuan() -> HunyuanDiTPipeline:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = bert(), t5(2)
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=2,
        cross_attention_dim=12,
        cross_attention_dim_t5=WIDTH,
        pooled_projection_dim=8,
        text_len=CLIP_TOKENS,
        text_len_t5=T5_TOKENS,
    )
    return HunyuanDiTPipeline(
        vae=vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=transformer,
        scheduler=DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(TEXTS) + "\n\n")
    return file


@pytest.mark.parametrize(("pipeline", "tokens"), [(PixArtAlphaPipeline, 120), (PixArtSigmaPipeline, 300)])
def test_pixart_prompts_are_what_its_pipeline_encodes(tmp_path: Path, texts: Path, pipeline: type, tokens: int) -> None:
    pipe = pixart(pipeline)
    pipe.save_pretrained(tmp_path / "model")
    out = embed(str(tmp_path / "model"), texts, tmp_path / "p.safetensors", EmbedOptions(negative="the tree"))
    found = load_file(out)
    assert found["prompt_embeds"].shape == (2, tokens, WIDTH)
    expected = pipe.encode_prompt(TEXTS, negative_prompt="the tree")
    names = ["prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask"]
    assert found.keys() == set(names)
    for name, tensor in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], tensor[: len(found[name])], atol=1e-6, rtol=0)
    # Captions differ, so a test that mixes them up fails.
    assert not torch.allclose(found["prompt_embeds"][0], found["prompt_embeds"][1], atol=1e-2)


def test_hunyuan_prompts_are_what_its_pipeline_encodes_with_both_encoders(tmp_path: Path, texts: Path) -> None:
    pipe = hunyuan()
    pipe.save_pretrained(tmp_path / "model")
    found = load_file(embed(str(tmp_path / "model" / "transformer"), texts, tmp_path / "p.safetensors"))
    for index, (suffix, tokens) in enumerate({"": CLIP_TOKENS, "_2": T5_TOKENS}.items()):
        embeds, negative, mask, negative_mask = pipe.encode_prompt(
            TEXTS, max_sequence_length=tokens, text_encoder_index=index
        )
        expected = {
            f"prompt_embeds{suffix}": embeds,
            f"prompt_attention_mask{suffix}": mask,
            f"negative_prompt_embeds{suffix}": negative[:1],
            f"negative_prompt_attention_mask{suffix}": negative_mask[:1],
        }
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0)
    assert len(found) == 8


def test_the_command_writes_the_same_bytes_in_batches_and_names_its_prompts(tmp_path: Path, texts: Path) -> None:
    pixart(PixArtAlphaPipeline).save_pretrained(tmp_path / "model")
    (tmp_path / "my.yaml").write_text("model: {weights: model}\npreset: w4a6\ncalibration: {prompts: p.safetensors}\n")
    command = ["embed", str(tmp_path / "my.yaml"), "--prompts", str(texts), "--quiet", "--dtype", "bfloat16"]
    command += ["--tokens", "7"]
    outputs = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for output in outputs:
        assert main([*command, "-o", str(output)]) == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with safe_open(outputs[0], framework="pt") as file:
        facts = json.loads(file.metadata()["fp4export.embed"])
        embeds = file.get_tensor("prompt_embeds")
    assert facts == {"prompts": [text.strip() for text in TEXTS], "negative": ""}
    assert (embeds.dtype, embeds.shape) == (torch.bfloat16, (2, 7, WIDTH))


def test_encoders_that_are_there_in_one_variant_only(tmp_path: Path, texts: Path) -> None:
    pipe = pixart(PixArtAlphaPipeline)
    pipe.save_pretrained(tmp_path / "model")
    whole = load_file(embed(str(tmp_path / "model"), texts, tmp_path / "whole.safetensors"))
    (tmp_path / "model" / "text_encoder" / "model.safetensors").unlink()
    pipe.text_encoder.half().save_pretrained(tmp_path / "model" / "text_encoder", variant="fp16")
    found = load_file(embed(str(tmp_path / "model"), texts, tmp_path / "half.safetensors"))["prompt_embeds"]
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), whole["prompt_embeds"], atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("output", "message"), [("p.txt", "expected NAME.safetensors"), ("no/p.safetensors", "mkdir -p")]
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_encoded(
    tmp_path: Path, texts: Path, output: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        embed(str(tmp_path / "no model here"), texts, tmp_path / output)


def test_class_labels_need_no_embedding(tmp_path: Path, texts: Path) -> None:
    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=3
    ).save_pretrained(tmp_path / "model" / "transformer")
    with pytest.raises(InputError, match=r"draws class labels and needs no embeddings.*calibration\.classes"):
        embed(str(tmp_path / "model"), texts, tmp_path / "p.safetensors")
    # Known from the recipe, without the Hub that has the model.
    with pytest.raises(InputError, match="dit_xl_2_256_w4a6: family dit draws class labels"):
        embed("dit_xl_2_256_w4a6", texts, tmp_path / "p.safetensors")


def _pickled(model: Path) -> None:
    (model / "text_encoder" / "model.safetensors").rename(model / "text_encoder" / "pytorch_model.bin")


def _foreign(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "text_encoder": ["os", "system"]}))


def _without(model: Path) -> None:
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pickled, r"text_encoder: not a T5EncoderModel that can be loaded.*pytorch_model\.bin is refused: a pickle"),
        (_foreign, r"text_encoder is os\.system; expected transformers' T5EncoderModel"),
        (_without, "names no text_encoder; this pipeline was saved without it"),
        (lambda model: (model / "model_index.json").unlink(), r"has no model_index\.json"),
        (lambda model: (model / "model_index.json").write_text("["), r"model_index\.json: cannot be read as JSON"),
    ],
)
def test_what_is_wrong_with_a_pipeline_is_named(
    tmp_path: Path, texts: Path, change: Callable[[Path], None], message: str
) -> None:
    pixart(PixArtAlphaPipeline).save_pretrained(tmp_path / "model")
    change(tmp_path / "model")
    with pytest.raises(InputError, match=message):
        embed(str(tmp_path / "model"), texts, tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


def test_captions_are_those_of_any_prompt_list(tmp_path: Path) -> None:
    lines, listed = tmp_path / "p.txt", tmp_path / "p.json"
    lines.write_text(" one \n\ntwo\n")
    listed.write_text('["one", "two\\nlines"]')
    assert read_texts(lines) == ["one", "two"]
    assert read_texts(listed) == ["one", "two\nlines"]
    listed.write_text('{"annotations": [{"caption": "b"}, {"caption": "a"}]}')
    assert read_texts(listed) == ["b", "a"]
    lines.write_text("\n\n")
    with pytest.raises(InputError, match="holds no prompts"):
        read_texts(lines)
    save_file({"prompt_embeds": torch.zeros(1, 2, 3)}, tmp_path / "p.safetensors")
    with pytest.raises(InputError, match="holds embeddings already"):
        read_texts(tmp_path / "p.safetensors")
