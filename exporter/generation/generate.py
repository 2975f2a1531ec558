"""Run a pipeline for some prompts, each from its own seed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.generation.conditions import Conditions
from exporter.runtime.engine import Engine
from exporter.runtime.transformer import EngineTransformer


@dataclass(frozen=True)
class Settings:
    """How to draw; `latent_size` is the (height, width) of the latents."""

    steps: int
    guidance: float
    latent_size: tuple[int, int]

    @property
    def guided(self) -> bool:
        """Whether there is guidance."""
        return self.guidance > 1.0

    @property
    def rows(self) -> int:
        """How many rows of a batch an image takes: guided, one without its prompt and one with it."""
        return 2 if self.guided else 1


@dataclass(frozen=True)
class Image:
    """One image to draw: the prompt's row in the conditions, and the seed of its noise."""

    row: int
    seed: int


@torch.no_grad()
def generate(
    pipeline: Any,
    conditions: Conditions,
    images: Sequence[Image],
    settings: Settings,
    on_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Draw `images` as one batch: float32 [n, 3, H, W] from 0 to 1 with an autoencoder, else latents [n, C, h, w].

    Every image draws all its noise from a CPU generator of its own. Where an engine takes no batch as small, the last
    image is drawn several times, and kept once. `on_step` is called after each of the transformer's calls. Raises
    `InputError` for prompts that do not fit the model, and where numbers stop being finite.
    """
    decodes = getattr(pipeline, "vae", None) is not None
    transformer, least = pipeline.transformer, 1
    if isinstance(transformer, EngineTransformer):
        least = _images_for(transformer.engine.smallest_batch, settings)
    batch = [*images, *[images[-1]] * (least - len(images))]
    arguments = _arguments(pipeline, conditions, batch, settings, decodes=decodes)
    hooks = [
        transformer.register_forward_pre_hook(_in_its_type, with_kwargs=True),
        transformer.register_forward_hook(_Predictions(batch, settings.steps, on_step), with_kwargs=True),
    ]
    try:
        result: Tensor = pipeline(**arguments)[0]
    except ValueError as error:
        # The pipelines check their arguments' shapes and kinds by ValueError.
        raise InputError(
            f"{type(pipeline).__name__} refuses the prompts: {str(error).partition(chr(10))[0]}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    drawn = result.float().cpu()[: len(images)]
    lost = _first_not_finite(drawn)
    if lost is not None:
        raise InputError(
            f"{_described(images[lost])}: the noise predictions are finite, but what came of them is NaN or infinite; "
            f"check {'the autoencoder (vae/) and ' if decodes else ''}--scheduler and --guidance"
        )
    return drawn


def _arguments(
    pipeline: Any, conditions: Conditions, images: Sequence[Image], settings: Settings, *, decodes: bool
) -> dict[str, Any]:
    """What the pipeline is called with. Raises `InputError` where it cannot draw that."""
    accepted = inspect.signature(type(pipeline).__call__).parameters
    if not decodes and "output_type" in accepted and "height" not in accepted:
        raise InputError(f"{type(pipeline).__name__} always makes images: its folder needs vae/")
    if settings.steps == 1 and type(pipeline).__name__ == "PixArtAlphaPipeline":
        # It takes a scheduler's second result then, which only distilled models' schedulers have.
        raise InputError("PixArtAlphaPipeline draws in one step with distilled models only; take at least 2 steps")
    height, width = (side * _scale(pipeline) for side in settings.latent_size)
    wanted = {
        **conditions.arguments(pipeline, [image.row for image in images], guided=settings.guided),
        "num_inference_steps": settings.steps,
        "guidance_scale": settings.guidance,
        "generator": [torch.Generator().manual_seed(image.seed) for image in images],
        "output_type": "pt" if decodes else "latent",
        "height": height,
        "width": width,
        "use_resolution_binning": False,
        # It would depend on whether two packages are installed, and `fp4export embed` does not do it either.
        "clean_caption": False,
        "return_dict": False,
    }
    return {name: value for name, value in wanted.items() if name in accepted}


class _Predictions:
    """Looks at each of the transformer's results, in the order of steps."""

    def __init__(self, images: Sequence[Image], steps: int, on_step: Callable[[], None]) -> None:
        self._images, self._steps, self._on_step = images, steps, on_step
        self._calls = 0

    def __call__(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Be a forward hook. Raises `InputError` for a noise prediction that is not finite."""
        self._calls += 1
        latents = args[0] if args else kwargs["hidden_states"]
        # Channels behind the noise are a variance that samplers leave out.
        lost = _first_not_finite(output[0][:, : latents.shape[1]])
        if lost is not None:
            # With guidance the images are there twice, first all without their prompts.
            image = self._images[lost % len(self._images)]
            advice = "check its weights and what the text encoders give"
            name = "the original"
            if isinstance(transformer, EngineTransformer):
                name = transformer.engine.name
                advice = "fp4export bisect names the layer, fp4export ranges the tensors that FP16 cannot hold"
            raise InputError(
                f"{name}: {_described(image)}: the noise prediction is NaN or infinite in step {self._calls} of "
                f"{self._steps}; {advice}"
            )
        self._on_step()


def _first_not_finite(batch: Tensor) -> int | None:
    """The first row of `batch` that holds NaN or an infinity."""
    finite = batch.flatten(1).isfinite().all(dim=1)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])


def _described(image: Image) -> str:
    return f"prompt {image.row}, seed {image.seed}"


def _in_its_type(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """All floats in the transformer's type: text encoders that are stored in FP16 give FP16."""

    def converted(value: Any) -> Any:
        is_floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(transformer.dtype) if is_floats else value

    return tuple(map(converted, args)), {name: converted(value) for name, value in kwargs.items()}


def _scale(pipeline: Any) -> int:
    """Pixels per latent pixel, which the pipelines divide height and width by."""
    return int(getattr(pipeline, "vae_scale_factor", 1))


def batches(images: Sequence[Image], size: int) -> list[Sequence[Image]]:
    """`images` in runs of `size`; the last may be shorter."""
    return [images[start : start + size] for start in range(0, len(images), size)]


def fitting_batch(wanted: int, engine: Engine, settings: Settings) -> int:
    """How many images to draw at once: `wanted`, or the nearest number of which the engine takes the batch.

    Raises `InputError` for an engine that takes no whole number of guided images.
    """
    least = _images_for(engine.smallest_batch, settings)
    if engine.largest_batch is None:
        return max(wanted, least)
    most = engine.largest_batch // settings.rows
    if most < least:
        takes = f"{engine.smallest_batch} to {engine.largest_batch}"
        raise InputError(f"{engine.name}: takes batches of {takes}, and a guided image is 2; build it for larger ones")
    return min(max(wanted, least), most)


def _images_for(batch: int, settings: Settings) -> int:
    """The fewest images that make a batch of at least so many rows."""
    return -(-batch // settings.rows)
