"""The setups in which published figures were measured, and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from exporter.errors import InputError, did_you_mean
from exporter.evaluation.prompts import Prompt, Selection

Seeding = Literal["same", "by name", "counting"]
FidMode = Literal["clean", "legacy_pytorch"]

_HASH_BASE, _HASH_MODULUS = 31, 1_000_000_007


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table; metric name → value."""

    label: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Preset:
    """A published setup. `prompt_file` says what the user must provide, `entries` how many prompts it must hold.

    `count` prompts are drawn, chosen as `selection` says, with seeds as `seeding` says; scheduler, steps and guidance
    None are the recipe's. `deviations` are differences from the published runs that the numbers can show.
    """

    name: str
    source: str
    model: str
    prompt_file: str
    entries: int | None
    count: int | None
    selection: Selection
    seeding: Seeding
    seed: int
    scheduler: str | None
    steps: int | None
    guidance: float | None
    fid_mode: FidMode
    published: tuple[PublishedRow, ...] = ()
    deviations: tuple[str, ...] = ()

    def check(self, file: str, prompts: int) -> None:
        """Raise `InputError` unless the list is the one that the setup draws from."""
        if self.entries is not None and prompts != self.entries:
            raise InputError(
                f"{file}: holds {prompts} prompts, but preset {self.name} draws from {self.prompt_file} with "
                f"{self.entries}; without --preset any list will do"
            )
        if self.count is not None and prompts < self.count:
            raise InputError(f"{file}: holds {prompts} prompts, but preset {self.name} draws {self.count}")

    def seed_of(self, prompt: Prompt) -> int:
        """The seed of a prompt's noise; it depends on nothing but the prompt."""
        if self.seeding == "same":
            return self.seed
        if self.seeding == "counting":
            return self.seed + prompt.row
        value = 0
        for character in prompt.name:
            value = (value * _HASH_BASE + ord(character)) % _HASH_MODULUS
        return value


_CPU_NOISE = "noise is drawn by PyTorch's CPU generator; the published runs drew it on the GPU"
_PRECISION = "the published originals ran in FP16, ours in FP32"
_CAPTIONS = (
    "captions are drawn as they are; the published runs left clean_caption to diffusers, which rewrites captions where "
    "bs4 and ftfy are installed"
)
_FP4DIT = "FP4DiT (arXiv 2503.15465), its code: scripts/pixart_sigma_brecq.py, qdiff/caption_util.py, README"
_NO_TABLE = "the paper's tables could not be obtained, so no published rows are shown"
_DEEPCOMPRESSOR = (
    "deepcompressor (SVDQuant, arXiv 2411.05007): examples/diffusion/README.md, configs/model/pixart-sigma.yaml, "
    "app/diffusion/eval"
)


def _fp4dit(name: str, prompt_file: str, entries: int, count: int | None) -> Preset:
    return Preset(
        name=name,
        source=_FP4DIT,
        model="PixArt-alpha 512 x 512, PixArt-Sigma and Hunyuan-DiT 1024 x 1024",
        prompt_file=prompt_file,
        entries=entries,
        count=count,
        selection="first",
        # `torch.manual_seed(42)` before every image.
        seeding="same",
        seed=42,
        scheduler="DPMSolverMultistepScheduler",
        steps=20,
        guidance=4.5,
        fid_mode="legacy_pytorch",
        deviations=(_CPU_NOISE, _PRECISION, _NO_TABLE, "for Hunyuan-DiT give --steps 50 --guidance 5"),
    )


def _row(label: str, fid: float, reward: float, lpips: float | None = None, psnr: float | None = None) -> PublishedRow:
    values = {"fid": fid, "image_reward": reward, "lpips": lpips, "psnr": psnr}
    return PublishedRow(label, MappingProxyType({key: value for key, value in values.items() if value is not None}))


_PIXART_SIGMA = (
    _row("FP16", 16.6, 0.944),
    _row("INT W8A8 ViDiT-Q", 15.7, 0.944, 0.137, 22.5),
    _row("INT W8A8 SVDQuant", 16.3, 0.955, 0.109, 23.7),
    _row("INT W4A8 ViDiT-Q", 37.3, 0.573, 0.611, 12.0),
    _row("INT W4A4 SVDQuant", 19.9, 0.858, 0.356, 17.0),
    _row("INT W4A4 SVDQuant + GPTQ", 19.2, 0.878, 0.323, 17.6),
    _row("NVFP4 round to nearest", 31.8, 0.660, 0.517, 14.8),
    _row("NVFP4 GPTQ", 27.2, 0.691, 0.482, 15.6),
    _row("NVFP4 SVDQuant", 17.3, 0.945, 0.290, 18.0),
    _row("NVFP4 SVDQuant + GPTQ", 16.6, 0.940, 0.271, 18.5),
)


def _deepcompressor(
    name: str, prompt_file: str, entries: int | None, published: tuple[PublishedRow, ...], note: str
) -> Preset:
    return Preset(
        name=name,
        source=_DEEPCOMPRESSOR,
        model="PixArt-Sigma 1024 x 1024",
        prompt_file=prompt_file,
        entries=entries,
        count=5000,
        selection="shuffled",
        seeding="by name",
        seed=0,
        scheduler="DPMSolverMultistepScheduler",
        steps=20,
        guidance=4.5,
        fid_mode="clean",
        published=published,
        deviations=(_PRECISION, _CAPTIONS, note),
    )


_TABLE = (
    _fp4dit("fp4dit", "captions_val2017.json (COCO annotations)", 25_014, 10_000),
    _fp4dit("fp4dit-hpsv2", "the HPSv2 benchmark's prompts, one a line", 3200, None),
    _fp4dit("fp4dit-pixart", "PixArt's 120 prompts, one a line (pixart_samples.txt)", 120, None),
    _deepcompressor(
        "deepcompressor",
        "MJHQ-30K's meta_data.json",
        30_000,
        _PIXART_SIGMA,
        "FID is against the 5,000 chosen images of MJHQ-30K: give them with --reference-images",
    ),
    _deepcompressor(
        "deepcompressor-sdci",
        "sDCI.yaml (mit-han-lab/svdquant-datasets)",
        None,
        (),
        "the table for sDCI is in the paper only, so no published rows are shown",
    ),
)
PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _TABLE})

OWN_SETUP = Preset(
    name="none",
    source="the recipe",
    model="any",
    prompt_file="any prompt list",
    entries=None,
    count=None,
    selection="first",
    seeding="counting",
    seed=0,
    scheduler=None,
    steps=None,
    guidance=None,
    fid_mode="clean",
)
"""What is done without a preset: every prompt of the list, prompt i from seed i."""


def get_preset(name: str | None) -> Preset:
    """The preset of a name, `OWN_SETUP` without one. Raises `InputError`."""
    if name is None:
        return OWN_SETUP
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]
