"""The gate on a real export of a tiny PixArt: it passes, and every kind of tampering is caught and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from diffusers import PixArtTransformer2DModel
from onnx import numpy_helper
from torch import nn

from exporter.calibration.capture import CalibrationSet
from exporter.calibration.scales import choose_scales
from exporter.errors import FidelityError, InputError
from exporter.files import sha256_of
from exporter.gate import segments
from exporter.gate.segments import SegmentedSession, with_constants_computed
from exporter.gate.snr import snr_db
from exporter.gate.table import GateResult
from exporter.models.pixart import PixArtAdapter
from exporter.models.prompts import Prompts
from exporter.passes import WAIST_PASSES, lowering_passes, run_passes
from exporter.plan import LayerPlan, Plan
from exporter.progress import NullProgress
from exporter.quantize import quantize_model, round_to_nearest
from exporter.runtime import OnnxSession
from exporter.targets import get_target
from exporter.to_onnx import to_onnx
from exporter.validate import (
    RESULT,
    captured_batches,
    table_text,
    validate_graphs,
    validate_output,
)
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


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, TOKENS)
    mask[1, 3:] = 0
    embeds = torch.randn(3, TOKENS, 24, generator=generator)
    return Prompts(
        {"encoder_hidden_states": embeds[:2], "encoder_attention_mask": mask},
        {"encoder_hidden_states": embeds[2:], "encoder_attention_mask": torch.ones(1, TOKENS)},
    )


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, prompts: Prompts) -> Export:
    folder = tmp_path_factory.mktemp("export")
    original = tiny_pixart()
    quantized = w4a6(original)
    to_onnx(quantized, ADAPTER, ADAPTER.example_inputs(quantized, 2, TOKENS), folder / "traced.onnx")
    for name in ("cpu", "rtx-sm86"):
        target = get_target(name)
        exported, _ = run_passes(onnx.load(folder / "traced.onnx"), WAIST_PASSES, target)
        lowered, _ = run_passes(exported, lowering_passes(target), target)
        onnx.save(exported, folder / "exported.onnx")
        onnx.save(lowered, folder / f"{name}.onnx")
    return Export(folder, original, quantized, captured_inputs(), prompts)


@pytest.fixture(scope="module")
def gate(export: Export) -> tuple[GateResult, Path]:
    folder = export.folder / "gate"
    return export.validate(export.path("cpu"), folder), folder


def test_batches_span_the_steps_with_and_without_prompt(prompts: Prompts) -> None:
    captured = captured_inputs()
    batches = captured_batches(captured, prompts)
    assert [batch.timestep.tolist() for batch in batches] == [[900.0] * 2, [650.0] * 2, [150.0] * 2]
    for batch in batches:
        assert torch.equal(batch.conditions["encoder_hidden_states"][1], prompts.negative["encoder_hidden_states"][0])
    assert torch.equal(batches[0].conditions["encoder_hidden_states"][0], prompts.positive["encoder_hidden_states"][0])
    assert torch.equal(batches[2].conditions["encoder_hidden_states"][0], prompts.positive["encoder_hidden_states"][1])


def test_batches_of_one_step_without_guidance(prompts: Prompts) -> None:
    everything = captured_inputs(1)
    captured = CalibrationSet(
        everything.hidden_states[2:], everything.timesteps[2:], everything.prompt_index[2:], everything.step_index[2:]
    )
    (batch,) = captured_batches(captured, prompts)
    assert batch.batch == 1


@pytest.mark.slow
def test_a_right_export_passes(export: Export, gate: tuple[GateResult, Path]) -> None:
    result, folder = gate
    assert result.passed
    for stage in ("exported", "lowered"):
        kinds = [row.kind for row in result.rows if row.stage == stage]
        assert kinds.count("linear") == 20
        assert kinds.count("block") == 2
        assert kinds.count("tail") == kinds.count("end_to_end") == 1
    assert result.code_mismatch_fraction == 0
    assert GateResult.from_json((folder / RESULT).read_text()) == result
    text = table_text(result)
    assert text.count("repeat: polygraphy run") == 3


@pytest.mark.slow
def test_a_gpus_graph_passes_and_the_notes_say_where_it_ran(export: Export, tmp_path: Path) -> None:
    result = export.validate(export.path("rtx-sm86"), tmp_path / "gate", "rtx-sm86")
    assert result.passed
    assert "rtx-sm86" in result.notes[0]
    assert all("ORT_DISABLE_ALL" in command for command in result.commands)


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


@pytest.mark.slow
@pytest.mark.parametrize("change", TAMPERINGS)
def test_tampering_is_caught_and_named(
    export: Export, gate: tuple[GateResult, Path], tmp_path: Path, change: Callable[[dict[str, np.ndarray]], str]
) -> None:
    folder = shutil.copytree(gate[1], tmp_path / "gate")
    output = tampered(export.path("cpu"), change, tmp_path / "output.onnx")
    with pytest.raises(FidelityError, match=LAYER) as caught:
        validate_output(output, folder, output, QUIET, built_sha256="")
    assert "lowered graph" in str(caught.value)
    rows = GateResult.from_json((folder / RESULT).read_text()).rows
    assert [row.name for row in rows if row.kind == "linear" and not row.passed] == [LAYER]


@pytest.mark.slow
def test_the_main_jobs_validation_fails_in_the_same_way(export: Export, tmp_path: Path) -> None:
    output = tampered(export.path("cpu"), scale_of_one_channel_off, tmp_path / "output.onnx")
    with pytest.raises(FidelityError, match=LAYER):
        export.validate(output, tmp_path / "gate")
    assert json.loads((tmp_path / "gate" / RESULT).read_text())["first_failure"].startswith(f"linear {LAYER}")


@pytest.mark.slow
def test_an_engine_is_validated_through_its_graph(
    export: Export, gate: tuple[GateResult, Path], tmp_path: Path
) -> None:
    folder, engine = shutil.copytree(gate[1], tmp_path / "gate"), tmp_path / "tiny.plan"
    engine.write_bytes(b"engine")
    built = sha256_of(engine)
    result = validate_output(engine, folder, export.path("rtx-sm86"), QUIET, built_sha256=built)
    assert "tiny.plan was not run" in result.notes[0]
    engine.write_bytes(b"another engine")
    with pytest.raises(FidelityError, match="SHA-256"):
        validate_output(engine, folder, export.path("rtx-sm86"), QUIET, built_sha256=built)
    with pytest.raises(InputError, match=r"gone\.onnx"):
        validate_output(engine, folder, tmp_path / "gone.onnx", QUIET, built_sha256="")


@pytest.mark.slow
def test_what_is_no_output_is_refused(export: Export, gate: tuple[GateResult, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no-validate"):
        validate_output(export.path("cpu"), tmp_path, export.path("cpu"), QUIET, built_sha256="")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a protobuf")
    with pytest.raises(InputError, match=r"broken\.onnx"):
        validate_output(broken, gate[1], broken, QUIET, built_sha256="")
    model = onnx.load(export.path("cpu"))
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(InputError, match="metadata"):
        validate_output(tmp_path / "foreign.onnx", gate[1], broken, QUIET, built_sha256="")


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86"])
def test_a_large_graph_is_compared_in_segments_with_the_same_verdicts(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    whole = export.validate(export.path(target), tmp_path / "whole", target)
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    parts = export.validate(export.path(target), tmp_path / "parts", target)
    assert [(row.kind, row.name, row.passed) for row in parts.rows] == [
        (row.kind, row.name, row.passed) for row in whole.rows
    ]
    # Fusions across the cuts may change the last bits of a result, and through a code a free-running one.
    for part, row in zip(parts.rows, whole.rows, strict=True):
        assert part.threshold_db == row.threshold_db
        assert part.snr_db == pytest.approx(row.snr_db, abs=25 if row.kind == "end_to_end" else 10)


@pytest.mark.parametrize("change", TAMPERINGS)
def test_tampering_with_a_large_graph_is_caught(
    export: Export,
    gate: tuple[GateResult, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[dict[str, np.ndarray]], str],
) -> None:
    monkeypatch.setattr(segments, "LARGEST_WHOLE", 0)
    folder = shutil.copytree(gate[1], tmp_path / "gate")
    output = tampered(export.path("cpu"), change, tmp_path / "output.onnx")
    with pytest.raises(FidelityError, match=LAYER):
        validate_output(output, folder, output, QUIET, built_sha256="")


@pytest.mark.parametrize("target", ["cpu", "rtx-sm86"])
def test_a_segmented_session_gives_what_the_whole_graph_gives(export: Export, target: str) -> None:
    inputs = export.captured.inputs(torch.arange(4), export.prompts).as_numpy()
    blocks = [name for name, _ in ADAPTER.blocks(export.quantized)]
    session = SegmentedSession(onnx.load(export.path(target)), blocks)
    expected = OnnxSession(export.path(target)).run(inputs)["sample"]
    first, second = (session.run(inputs)["sample"] for _ in range(2))
    assert np.array_equal(first, second)
    assert snr_db(expected, first) > 40


def test_constants_are_computed_as_they_would_be_when_the_graph_runs(export: Export) -> None:
    model = onnx.load(export.path("exported"))
    computed = with_constants_computed(model)
    assert not any(node.domain == "fp4export" for node in computed.graph.node)
    assert sum(len(tensor.raw_data) for tensor in computed.graph.initializer) > 4 * sum(
        len(tensor.raw_data) for tensor in model.graph.initializer if tensor.name.endswith(".words")
    )
    inputs = export.captured.inputs(torch.arange(2), export.prompts).as_numpy()
    one, other = (OnnxSession(graph).run(inputs)["sample"] for graph in (model, computed))
    assert np.array_equal(one, other)
