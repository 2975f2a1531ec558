"""What the gate saved, read back; polygraphy's comparison is real, running an engine needs its GPU."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from exporter.device.acceptance import Acceptance, find_acceptance, worst_snr
from exporter.errors import InputError


def _folder(path: Path, verdict: object) -> Path:
    for name in ("model.inputs.json", "model.reference.json"):
        (path / name).write_text("[]")
    (path / "result.json").write_text(json.dumps(verdict))
    return path


def _row(stage: str, kind: str, threshold: float) -> dict[str, object]:
    return {"stage": stage, "kind": kind, "threshold_db": threshold}


def test_the_engine_is_held_to_the_lowered_graph_s_limit(tmp_path: Path) -> None:
    facts = [("exported", "end_to_end", 60.0), ("lowered", "linear", 100.0), ("lowered", "end_to_end", 41.27)]
    rows = [_row(*fact) for fact in facts]
    found = find_acceptance(_folder(tmp_path, {"passed": True, "rows": rows}))
    assert found == Acceptance(tmp_path / "model.inputs.json", tmp_path / "model.reference.json", 41.27)
    command = found.command(Path("a b.plan"), rtx=False)
    assert command.startswith("polygraphy run 'a b.plan' --trt --model-type engine --load-inputs ")
    assert command.endswith(" --compare snr --snr-threshold 41.2")
    assert found.command(Path("a.plan"), rtx=True).startswith("POLYGRAPHY_USE_TENSORRT_RTX=1 polygraphy run a.plan ")


@pytest.mark.parametrize(("limit", "asked"), [(100.0, 50.0), (50.1, 50.0), (49.9, 49.9)])
def test_a_gpu_may_round_to_tf32(tmp_path: Path, limit: float, asked: float) -> None:
    found = find_acceptance(_folder(tmp_path, {"passed": True, "rows": [_row("lowered", "end_to_end", limit)]}))
    assert found is not None
    assert found.least_db == asked


def test_nothing_saved_is_no_error(tmp_path: Path) -> None:
    assert find_acceptance(tmp_path) is None
    assert find_acceptance(tmp_path / "none") is None


@pytest.mark.parametrize("verdict", [[], {}, {"passed": True, "rows": []}, {"passed": True, "rows": [{"stage": 1}]}])
def test_a_damaged_verdict_is_refused(tmp_path: Path, verdict: object) -> None:
    with pytest.raises(InputError, match=r"result\.json: not a verdict of this version"):
        find_acceptance(_folder(tmp_path, verdict))


def test_a_graph_that_failed_accepts_no_engine(tmp_path: Path) -> None:
    rows = [_row("lowered", "end_to_end", 51.0)]
    with pytest.raises(InputError, match="the graph itself failed its validation"):
        find_acceptance(_folder(tmp_path, {"passed": False, "rows": rows}))


def test_the_worst_output_of_the_worst_input_counts() -> None:
    exact = np.linspace(-1, 1, 1000, dtype=np.float32)
    expected = [{"sample": exact, "only here": exact}] * 2
    found = worst_snr(expected, [{"sample": exact * np.float32(1.001)}, {"sample": exact * np.float32(1.01)}])
    assert set(found) == {"sample"}
    assert found["sample"] == pytest.approx(40.0, abs=0.01)


def test_a_nan_or_another_shape_is_the_worst_of_all() -> None:
    exact = np.linspace(-1, 1, 10, dtype=np.float32)
    broken = exact.copy()
    broken[3] = np.nan
    for wrong in (broken, exact[:5]):
        assert math.isnan(worst_snr([{"y": exact}] * 2, [{"y": wrong}, {"y": exact}])["y"])


def test_nothing_in_common_is_an_error() -> None:
    exact = np.zeros(3, np.float32)
    for found in ([{"z": exact}], [], [{"y": exact}, {"y": exact}]):
        with pytest.raises(ValueError, match="no output in common"):
            worst_snr([{"y": exact}], found)
