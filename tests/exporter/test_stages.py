"""What one target's stages leave in the work folder, another target's do not replace."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.job import open_job
from exporter.progress import NullProgress
from exporter.recipe import load_recipe
from exporter.source import load_source
from exporter.stages import calibrated_weights, captured_inputs


@pytest.mark.slow
def test_targets_with_other_group_multipliers_keep_their_own_weights(tiny_job: Path, tmp_path: Path) -> None:
    work = tmp_path / "x.work"
    multipliers, written = [], []
    for target, output in (("cpu", "x.onnx"), ("rtx-sm89", "x.plan"), ("rtx-sm120", "x.plan"), ("cpu", "x.onnx")):
        recipe = load_recipe(tiny_job / "tiny.yaml", ["preset=w4a8", "method.name=rtn"], target)
        progress = NullProgress()
        job = open_job(recipe, tmp_path / output, work, fresh=False, keep_graphs=False, progress=progress)
        source = load_source(job)
        multipliers.append({layer.multipliers for layer in source.plan.layers})
        calibrated_weights(job, source, captured_inputs(job, source))
        written.append({path.name: path.stat().st_mtime_ns for path in work.glob("quantized.*.safetensors")})
    assert multipliers[0] != multipliers[1] == multipliers[2], "else this test says nothing"
    assert [len(files) for files in written] == [1, 2, 2, 2]
    assert written[0].items() <= written[1].items() == written[2].items() == written[3].items()
