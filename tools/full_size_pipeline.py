"""What a pipeline's folder holds beside its transformer, at full size with random weights: autoencoder, text encoder.

Run as a process of its own (`python -m tools.full_size_pipeline MODEL_DIR [TEXT_ENCODER_LAYERS]`), as
`tools.full_size_models` is. What is there already stays.
"""

from __future__ import annotations

import json
import shutil
import string
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from exporter.files import atomic_path, write_text_atomically
from exporter.models.text_encoders import MODEL_INDEX

TEXT_ENCODER_LAYERS = 24
"""T5-XXL's."""
_SHARD = "1GB"
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
# T5-XXL's encoder but for its number of layers.
_T5: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 32128,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
    }
)
_INDEX = MappingProxyType(
    {
        "_class_name": "PixArtAlphaPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
)


def text_encoder_bytes(layers: int) -> int:
    """The size of T5-XXL's encoder with so many layers, in BF16."""
    width, hidden = int(_T5["d_model"]), int(_T5["d_ff"])
    inner = int(_T5["num_heads"]) * int(_T5["d_kv"])
    return 2 * (int(_T5["vocab_size"]) * width + layers * (4 * width * inner + 3 * width * hidden))


def make_parts(model: Path, text_encoder_layers: int) -> None:
    """Write the autoencoder and, unless it has no layers, the text encoder beside the transformer in `model`."""
    import diffusers

    torch.manual_seed(0)
    if not (model / "vae").is_dir():
        autoencoder: Any = diffusers.AutoencoderKL(**_AUTOENCODER)
        with atomic_path(model / "vae") as folder:
            autoencoder.save_pretrained(folder)
    if text_encoder_layers and layers_of_text_encoder(model) != text_encoder_layers:
        _make_text_encoder(model, text_encoder_layers)
    write_text_atomically(model / MODEL_INDEX, json.dumps(dict(_INDEX), indent=1))


def layers_of_text_encoder(model: Path) -> int:
    """How many layers the text encoder in `model` has, 0 where there is none."""
    config = model / "text_encoder" / "config.json"
    return int(json.loads(config.read_text(encoding="utf-8"))["num_layers"]) if config.is_file() else 0


def _make_text_encoder(model: Path, layers: int) -> None:
    """T5-XXL's encoder in BF16 and a tokenizer of single characters."""
    import transformers

    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(model / part, ignore_errors=True)
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_letters, *string.punctuation]
    tokenizer: Any = transformers.T5Tokenizer(vocab=[(piece, -float(n)) for n, piece in enumerate(pieces)], extra_ids=0)
    torch.set_default_dtype(torch.bfloat16)
    encoder: Any = transformers.T5EncoderModel(transformers.T5Config(**_T5, num_layers=layers))
    torch.set_default_dtype(torch.float32)
    with atomic_path(model / "text_encoder") as folder:
        encoder.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer.save_pretrained(model / "tokenizer")


if __name__ == "__main__":
    make_parts(Path(sys.argv[1]), int(sys.argv[2]))
