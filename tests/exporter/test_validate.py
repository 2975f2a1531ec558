"""The gate on a real export of a tiny PixArt: it passes, and every kind of tampering is caught and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from exporter.calibration.capture import CalibrationSet
from exporter.errors import FidelityError, InputError
from exporter.files import sha256_of
from exporter.gate.table import GateResult
from exporter.validate import (
    RESULT,
    captured_batches,
    table_text,
    validate_output,
)
from tests.exporter.validated_export import (
    LAYER,
    QUIET,
    TAMPERINGS,
    Export,
    captured_inputs,
    scale_of_one_channel_off,
    tampered,
    two_prompts,
)


def test_batches_span_the_steps_with_and_without_prompt() -> None:
    prompts = two_prompts()
    captured = captured_inputs()
    batches = captured_batches(captured, prompts)
    assert [batch.timestep.tolist() for batch in batches] == [[900.0] * 2, [650.0] * 2, [150.0] * 2]
    for batch in batches:
        assert torch.equal(batch.conditions["encoder_hidden_states"][1], prompts.negative["encoder_hidden_states"][0])
    assert torch.equal(batches[0].conditions["encoder_hidden_states"][0], prompts.positive["encoder_hidden_states"][0])
    assert torch.equal(batches[2].conditions["encoder_hidden_states"][0], prompts.positive["encoder_hidden_states"][1])


def test_batches_of_one_step_without_guidance() -> None:
    everything = captured_inputs(1)
    captured = CalibrationSet(
        everything.hidden_states[2:], everything.timesteps[2:], everything.prompt_index[2:], everything.step_index[2:]
    )
    (batch,) = captured_batches(captured, two_prompts())
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
