"""The graphs that are compared: FP32, ONNX Runtime's own INT8, and what fp4export makes of the same weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx
import torch
from onnx import inliner
from torch import Tensor, nn

from exporter.calibration.scales import choose_scales
from exporter.files import atomic_path
from exporter.models.pixart import PixArtAdapter
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.passes.driver import Pass
from exporter.passes.fused_attention import fuse_attention
from exporter.plan import LinearShape, ModelShapes, Plan, plan_layers
from exporter.progress import Progress
from exporter.quantize import QuantizedWeight, quantize_model, round_to_nearest
from exporter.recipe import Recipe
from exporter.targets import TARGETS, Storage
from exporter.to_onnx import to_onnx
from exporter.tracing import OPSET
from exporter.workdir import program_identity
from plugins.formats import get_format
from tools.cpu_bench.model import CAPTION_TOKENS

CPU = TARGETS["cpu"]
_KEY_DIGITS = 12
FP32, FP32_FUSED, DYNAMIC = "FP32", "FP32, attention fused", "quantize_dynamic INT8"


@dataclass(frozen=True)
class Variant:
    """One way of quantizing, in the words of a recipe."""

    activation: str
    storage: Storage = "packed"


VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "W4A6 (E2M1 × E2M3)": Variant("e2m3"),
        "W4A8 (E2M1 × INT8)": Variant("int8"),
        "W4A8 (E2M1 × INT8), stored as INT8": Variant("int8", "container"),
    }
)


W4 = tuple(VARIANTS)[:2]
"""The two that the aims of the CPU path speak of."""


def make_graphs(model: Callable[[], nn.Module], folder: Path, progress: Progress) -> dict[str, Path]:
    """Name → ONNX file in `folder`; those that this very source made before are used as they are.

    `model` makes the transformer.
    """
    key = program_identity()[:_KEY_DIGITS]
    names = (FP32, FP32_FUSED, DYNAMIC, *VARIANTS)
    paths = {name: folder / f"{index}.{key}.onnx" for index, name in enumerate(names)}
    missing = [name for name, path in paths.items() if not path.is_file()]
    with progress.task("graphs", len(missing)) as task:
        for name in missing:
            _make(name, model, paths, progress)
            task.advance()
    return paths


def _make(name: str, model: Callable[[], nn.Module], paths: Mapping[str, Path], progress: Progress) -> None:
    if name == FP32:
        export_float(model(), paths[FP32], tokens=CAPTION_TOKENS)
    elif name == FP32_FUSED:
        fused, _ = run_passes(onnx.load(paths[FP32]), (*WAIST_PASSES, fuse_attention), CPU)
        _save(fused, paths[name])
    elif name == DYNAMIC:
        quantize_dynamically(paths[FP32], paths[name])
    else:
        _export_quantized(model(), VARIANTS[name], paths[name], progress)


def _save(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


def export_float(model: nn.Module, path: Path, *, tokens: int) -> None:
    """The transformer as torch exports it, with `tokens` caption tokens, but for a Squeeze that no runtime takes."""
    adapter = PixArtAdapter()
    example = adapter.example_inputs(model, batch=2, tokens=tokens)
    inputs, names = example.as_dict(), adapter.input_names(model)
    arguments = tuple(inputs[name] for name in names)
    batch = torch.export.Dim("batch", min=1, max=64)
    module = adapter.forward_module(model, example)
    program = torch.export.export(module, arguments, dynamic_shapes=tuple({0: batch} for _ in arguments), strict=False)
    exported = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=OPSET,
        input_names=list(names),
        output_names=["sample"],
        verbose=False,
    )
    if exported is None:
        raise RuntimeError("torch.onnx.export returned no program")
    plain: tuple[Pass, ...] = tuple(run for run in WAIST_PASSES if run.__name__ == "drop_noop_squeezes")
    _save(run_passes(exported.model_proto, plain, CPU)[0], path)


def quantize_dynamically(source: Path, path: Path) -> None:
    """ONNX Runtime's own dynamic quantization at its best: INT8 weights per channel, every MatMul with a weight."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Without its weights, which stay in the file that both graphs name.
    model = inliner.inline_local_functions(onnx.load(source, load_external_data=False))
    # Its shape inference rejects what torch wrote about transposed weights.
    del model.graph.value_info[:]
    plain = source.with_name(f"{path.stem}.plain.onnx")
    onnx.save(model, plain)
    logging.disable(logging.WARNING)
    quantize_dynamic(plain, path, per_channel=True, weight_type=QuantType.QInt8, use_external_data_format=True)
    logging.disable(logging.NOTSET)
    plain.unlink()


def _export_quantized(model: nn.Module, variant: Variant, path: Path, progress: Progress) -> None:
    adapter = PixArtAdapter()
    plan = _plan(model, variant)
    quantized = quantize_model(model, plan, _nearest(model, plan, path.parent / "weights.safetensors", progress))
    traced = path.with_suffix(".traced.onnx")
    to_onnx(quantized, adapter, adapter.example_inputs(quantized, batch=2, tokens=CAPTION_TOKENS), traced)
    passes = (*WAIST_PASSES, *lowering_passes(CPU))
    lowered, _ = run_passes(onnx.load(traced), passes, CPU.with_storage(variant.storage))
    with atomic_path(path) as temporary:
        onnx.save(lowered, temporary)
    traced.unlink()


def _plan(model: nn.Module, variant: Variant) -> Plan:
    linears = {
        name: LinearShape(module.out_features, module.in_features, module.bias is not None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    recipe: dict[str, Any] = {
        "model": {"weights": "random"},
        "preset": "w4a6",
        "calibration": {"prompts": "none"},
        "layers": [{"match": "transformer_blocks.*", "activation": variant.activation}],
    }
    return plan_layers(Recipe.model_validate(recipe), ModelShapes(linears, {}), PixArtAdapter().high_precision, CPU)


def _nearest(model: nn.Module, plan: Plan, cache: Path, progress: Progress) -> dict[str, QuantizedWeight]:
    """Every weight rounded to nearest on searched foldable scales, the same for all variants."""
    from safetensors.torch import load_file, save_file

    if not cache.is_file():
        tensors: dict[str, Tensor] = {}
        with progress.task("weights", len(plan.layers)) as task:
            for layer in plan.layers:
                weight, fmt = (
                    model.get_submodule(layer.name).get_parameter("weight").detach(),
                    get_format(layer.weight_format),
                )
                scales = choose_scales(weight, fmt, layer.group_size, "mse", None, layer.multipliers)
                nearest = round_to_nearest(weight, scales, fmt)
                tensors |= {f"{layer.name}.codes": nearest.codes, f"{layer.name}.scales": nearest.scales}
                task.advance()
        save_file(tensors, cache)
    tensors = load_file(cache)
    return {
        layer.name: QuantizedWeight(tensors[f"{layer.name}.codes"], tensors[f"{layer.name}.scales"])
        for layer in plan.layers
    }
