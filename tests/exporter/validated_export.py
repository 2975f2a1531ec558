"""A tiny PixArt, quantized and exported for the CPU and for a GPU, and ways to tamper with what was exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from diffusers import PixArtTransformer2DModel
from onnx import numpy_helper
from torch import nn

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.scales import choose_scales
from exporter.gate.table import GateResult
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quantize import quantize_model, round_to_nearest
from exporter.targets import get_target
from exporter.to_onnx import to_onnx
from exporter.validate import captured_batches, validate_graphs
from plugins.formats import get_format
from tests.exporter.tampering import flip_a_bit_of_one_code, swap_two_codes

ADAPTER = PixArtAdapter()
TOKENS, WIDTH = 5, 64
LAYER = "transformer_blocks.1.ff.net.0.proj"
QUIET = NullProgress()


@dataclass(frozen=True)
class Export:
    """Everything that validation takes, for the CPU and for a GPU."""

    folder: Path
    original: nn.Module
    quantized: nn.Module
    captured: CalibrationSet
    prompts: Prompts

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    def validate(self, lowered: Path, folder: Path, target: str = "cpu") -> GateResult:
        batches = captured_batches(self.captured, self.prompts)
        result, _ = validate_graphs(
            self.original,
            self.quantized,
            ADAPTER,
            batches,
            self.path("exported"),
            lowered,
            folder,
            get_target(target),
            QUIET,
        )
        return result


def tiny_pixart() -> nn.Module:
    torch.manual_seed(4)
    model = PixArtTransformer2DModel(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=WIDTH // 2,
        cross_attention_dim=WIDTH,
        caption_channels=24,
        in_channels=2,
        out_channels=4,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    return model.eval().requires_grad_(False)


def w4a6(model: nn.Module) -> nn.Module:
    layers, weights, fmt = [], {}, get_format("e2m1")
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name.startswith("transformer_blocks"):
            n, k = linear.weight.shape
            layer = LayerPlan(name, n, k, linear.bias is not None, "e2m1", "e2m3", 32, "foldable", "int8")
            scales = choose_scales(linear.weight, fmt, 32, "absmax", multipliers=layer.multipliers)
            layers.append(layer)
            weights[name] = round_to_nearest(linear.weight, scales, fmt)
    return quantize_model(model, Plan(tuple(layers), (), 0, 0), weights)


def captured_inputs(steps: int = 4) -> CalibrationSet:
    """Per step two trajectories, with and without their prompt."""
    generator = torch.Generator().manual_seed(0)
    step_index = torch.arange(steps).repeat_interleave(4)
    return CalibrationSet(
        hidden_states=torch.randn(4 * steps, 2, 8, 8, generator=generator),
        timesteps=900.0 - 250 * step_index,
        prompt_index=torch.tensor([-1, -1, 0, 1]).repeat(steps),
        step_index=step_index,
    )


def two_prompts() -> Prompts:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, TOKENS)
    mask[1, 3:] = 0
    embeds = torch.randn(3, TOKENS, 24, generator=generator)
    return Prompts(
        {"encoder_hidden_states": embeds[:2], "encoder_attention_mask": mask},
        {"encoder_hidden_states": embeds[2:], "encoder_attention_mask": torch.ones(1, TOKENS)},
    )


def traced_pixart(folder: Path) -> None:
    """Trace it."""
    quantized = w4a6(tiny_pixart())
    to_onnx(quantized, ADAPTER, ADAPTER.example_inputs(quantized, 2, TOKENS), folder / "traced.onnx")


def export_tiny_pixart(folder: Path) -> Export:
    """Lower for both what was traced in `folder`."""
    original = tiny_pixart()
    quantized = w4a6(original)
    for name in ("cpu", "rtx-sm86"):
        target = get_target(name)
        exported, _ = run_passes(onnx.load(folder / "traced.onnx"), WAIST_PASSES, target)
        lowered, _ = run_passes(exported, lowering_passes(target), target)
        onnx.save(exported, folder / "exported.onnx")
        onnx.save(lowered, folder / f"{name}.onnx")
    return Export(folder, original, quantized, captured_inputs(), two_prompts())


def scale_off_by_one_percent(arrays: dict[str, np.ndarray]) -> str:
    arrays[f"{LAYER}.row_scales"] *= np.float32(1.01)
    return f"{LAYER}.row_scales"


def scale_of_one_channel_off(arrays: dict[str, np.ndarray]) -> str:
    arrays[f"{LAYER}.row_scales"][9] *= np.float32(1.01)
    return f"{LAYER}.row_scales"


def one_nibble_flipped(arrays: dict[str, np.ndarray]) -> str:
    return flip_a_bit_of_one_code(arrays, LAYER)


def a_pair_swapped(arrays: dict[str, np.ndarray]) -> str:
    return swap_two_codes(arrays, LAYER)


TAMPERINGS = (scale_off_by_one_percent, scale_of_one_channel_off, one_nibble_flipped, a_pair_swapped)


def tampered(path: Path, change: Callable[[dict[str, np.ndarray]], str], output: Path) -> Path:
    model = onnx.load(path)
    arrays = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in model.graph.initializer}
    name = change(arrays)
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(arrays[name], name))
    onnx.save(model, output)
    return output
