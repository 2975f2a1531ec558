"""What a pipeline's folder holds beside its transformer, at full size with random weights: autoencoder, text encoders.

Run as a process of its own (`python -m tools.full_size_pipeline MODEL MODEL_DIR TEXT_ENCODER_LAYERS`), as
`tools.full_size_models` is. What is there already stays.
"""

from __future__ import annotations

import json
import shutil
import string
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from exporter.files import atomic_path, write_text_atomically
from exporter.models.text_encoders import MODEL_INDEX
from tools.full_size_models import MODELS

TEXT_ENCODER_LAYERS = 24
"""Those of every published one: T5-XXL, mT5-XL, the bilingual CLIP."""
_SHARD = "1GB"


@dataclass(frozen=True)
class TextEncoderKind:
    """transformers' classes, the config's key for the number of layers, and a tokenizer's vocabulary: characters."""

    encoder: str
    config: str
    layers: str
    tokenizer: str
    tokenizer_options: Mapping[str, Any]


_T5_PIECES = ("<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.punctuation)
_T5 = TextEncoderKind(
    encoder="T5EncoderModel",
    config="T5Config",
    layers="num_layers",
    tokenizer="T5Tokenizer",
    tokenizer_options=MappingProxyType(
        {"vocab": [(piece, -float(n)) for n, piece in enumerate(_T5_PIECES)], "extra_ids": 0}
    ),
)
_BERT_PIECES = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *string.punctuation),
    # Behind the first character of a word.
    *(f"##{letter}" for letter in string.ascii_lowercase),
)
_BERT = TextEncoderKind(
    encoder="BertModel",
    config="BertConfig",
    layers="num_hidden_layers",
    tokenizer="BertTokenizer",
    tokenizer_options=MappingProxyType({"vocab": {piece: n for n, piece in enumerate(_BERT_PIECES)}}),
)


@dataclass(frozen=True)
class TextEncoderShape:
    """A published text encoder but for its number of layers, and the folders of it and of its tokenizer."""

    kind: TextEncoderKind
    config: Mapping[str, Any]
    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"

    def new(self, layers: int) -> Any:
        """The encoder with so many layers and random weights, on torch's default device and in its default type."""
        import transformers

        config: Any = getattr(transformers, self.kind.config)(**self.config, **{self.kind.layers: layers})
        return getattr(transformers, self.kind.encoder)(config)

    def layers_in(self, model: Path) -> int:
        """How many layers the one in `model` has, 0 where there is none."""
        config = model / self.folder / "config.json"
        return int(json.loads(config.read_text(encoding="utf-8"))[self.kind.layers]) if config.is_file() else 0


@dataclass(frozen=True)
class PipelineShape:
    """diffusers' pipeline of a model: its class, parts, and what else its model_index.json says.

    `text_in_words` has {layers}, those of each text encoder.
    """

    class_name: str
    transformer: str
    autoencoder: Mapping[str, Any]
    text_encoders: tuple[TextEncoderShape, ...]
    text_in_words: str
    others: Mapping[str, Any] = field(default_factory=dict)

    def index(self) -> dict[str, Any]:
        """The content of model_index.json."""
        index: dict[str, Any] = {
            "_class_name": self.class_name,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "transformer": ["diffusers", self.transformer],
            "vae": ["diffusers", "AutoencoderKL"],
            **self.others,
        }
        for shape in self.text_encoders:
            index[shape.folder] = ["transformers", shape.kind.encoder]
            index[shape.tokenizer] = ["transformers", shape.kind.tokenizer]
        return index

    def text_encoder_layers(self, model: Path) -> int:
        """How many layers every text encoder in `model` has at least, 0 where one is missing."""
        return min(shape.layers_in(model) for shape in self.text_encoders)

    def text_encoder_bytes(self, layers: int) -> int:
        """The size of all text encoders with so many layers, in BF16."""
        with torch.device("meta"):
            return 2 * sum(int(shape.new(layers).num_parameters()) for shape in self.text_encoders)


# That of Stable Diffusion, which PixArt-α uses.
_AUTOENCODER: Mapping[str, Any] = MappingProxyType(
    {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 256,
    }
)
_T5_XXL = MappingProxyType(
    {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }
)
_MT5_XL = MappingProxyType({**_T5_XXL, "vocab_size": 250112, "d_model": 2048, "d_ff": 5120, "num_heads": 32})
_BERT_LARGE = MappingProxyType(
    {"vocab_size": 47020, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
)
PIPELINES: Mapping[str, PipelineShape] = MappingProxyType(
    {
        "pixart": PipelineShape(
            class_name="PixArtAlphaPipeline",
            transformer=MODELS["pixart"].class_name,
            autoencoder=_AUTOENCODER,
            text_encoders=(TextEncoderShape(_T5, _T5_XXL),),
            text_in_words=f"text encoder, which has T5-XXL's width and {{layers}} of its {TEXT_ENCODER_LAYERS} layers",
        ),
        "hunyuan": PipelineShape(
            class_name="HunyuanDiTPipeline",
            transformer=MODELS["hunyuan"].class_name,
            # That of Stable Diffusion XL.
            autoencoder=MappingProxyType({**_AUTOENCODER, "scaling_factor": 0.13025}),
            text_encoders=(
                TextEncoderShape(_BERT, _BERT_LARGE),
                TextEncoderShape(_T5, _MT5_XL, folder="text_encoder_2", tokenizer="tokenizer_2"),
            ),
            text_in_words="text encoders, which have the widths of the bilingual CLIP and of mT5-XL and {layers} of "
            f"the {TEXT_ENCODER_LAYERS} layers of each",
            others=MappingProxyType(
                {
                    "feature_extractor": [None, None],
                    "safety_checker": [None, None],
                    "requires_safety_checker": False,
                }
            ),
        ),
    }
)


def make_parts(shape: PipelineShape, model: Path, text_encoder_layers: int) -> None:
    """Write the autoencoder and, unless they have no layers, the text encoders beside the transformer in `model`."""
    import diffusers

    torch.manual_seed(0)
    if not (model / "vae").is_dir():
        autoencoder: Any = diffusers.AutoencoderKL(**shape.autoencoder)
        with atomic_path(model / "vae") as folder:
            autoencoder.save_pretrained(folder)
    for text_encoder in shape.text_encoders:
        if text_encoder_layers and text_encoder.layers_in(model) != text_encoder_layers:
            _make_text_encoder(text_encoder, model, text_encoder_layers)
    write_text_atomically(model / MODEL_INDEX, json.dumps(shape.index(), indent=1))


def _make_text_encoder(shape: TextEncoderShape, model: Path, layers: int) -> None:
    """The encoder in BF16 and its tokenizer."""
    import transformers

    for part in (shape.folder, shape.tokenizer):
        shutil.rmtree(model / part, ignore_errors=True)
    torch.set_default_dtype(torch.bfloat16)
    encoder = shape.new(layers)
    torch.set_default_dtype(torch.float32)
    with atomic_path(model / shape.folder) as folder:
        encoder.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer: Any = getattr(transformers, shape.kind.tokenizer)(**shape.kind.tokenizer_options)
    tokenizer.save_pretrained(model / shape.tokenizer)


if __name__ == "__main__":
    make_parts(PIPELINES[sys.argv[1]], Path(sys.argv[2]), int(sys.argv[3]))
