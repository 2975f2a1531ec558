"""The gate's saved inputs and reference outputs, run through the engine by polygraphy."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.device.tensorrt_api import BuildError
from exporter.errors import InputError

MOST_ASKED_DB = 50.0
"""The most that is asked of an engine, whatever the limit of its graph: a GPU's FP32 products may round their operands
to TF32, 11 significant bits, which leaves about 60 dB."""

INPUTS, OUTPUTS, VERDICT = "model.inputs.json", "model.reference.json", "result.json"


@dataclass(frozen=True)
class Acceptance:
    """What an engine is compared with: polygraphy's files, and the least SNR in dB of the whole model."""

    inputs: Path
    outputs: Path
    least_db: float

    def command(self, engine: Path, *, rtx: bool) -> str:
        """The same comparison as one polygraphy command."""
        words = ["polygraphy", "run", str(engine), "--trt", "--model-type", "engine", "--load-inputs", str(self.inputs)]
        words += ["--load-outputs", str(self.outputs), "--compare", "snr", "--snr-threshold"]
        words.append(f"{math.floor(self.least_db * 10) / 10:g}")
        return ("POLYGRAPHY_USE_TENSORRT_RTX=1 " if rtx else "") + shlex.join(words)


def find_acceptance(folder: Path) -> Acceptance | None:
    """What the gate left in `folder` of a graph that passed; None where it left nothing.

    The engine is held to the limit that the lowered graph was, or to `MOST_ASKED_DB` if that is less. Raises
    `InputError` for a damaged or failed verdict.
    """
    inputs, outputs, verdict = (folder / name for name in (INPUTS, OUTPUTS, VERDICT))
    if not all(file.is_file() for file in (inputs, outputs, verdict)):
        return None
    try:
        facts = json.loads(verdict.read_text(encoding="utf-8"))
        passed = bool(facts["passed"])
        rows = [row for row in facts["rows"] if (row["stage"], row["kind"]) == ("lowered", "end_to_end")]
        least_db = float(rows[-1]["threshold_db"])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"{verdict}: not a verdict of this version ({error!r}); export again") from error
    if not passed:
        raise InputError(f"{verdict}: the graph itself failed its validation; export again, or use --no-acceptance")
    return Acceptance(inputs, outputs, min(least_db, MOST_ASKED_DB))


def compare_outputs(engine: Path, inputs: Path, outputs: Path) -> Mapping[str, float]:
    """Each output's worst SNR in dB over the saved inputs (NaN where one is NaN). Needs the engine's GPU.

    Raises `BuildError` where polygraphy cannot load or run it, or the reference has none of its outputs.
    """
    from polygraphy.backend.common import BytesFromPath
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner
    from polygraphy.comparator import RunResults
    from polygraphy.exception import PolygraphyException
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            feeds = load_json(str(inputs))
            reference = RunResults.load(str(outputs))
            with TrtRunner(EngineFromBytes(BytesFromPath(str(engine)))) as runner:
                wanted = sorted(runner.get_input_metadata())
                results = []
                for feed in feeds:
                    given = {name: feed[name] for name in wanted}
                    _check_profile(runner.engine, given)
                    results.append(dict(runner.infer(given, copy_outputs_to_host=True)))
        (iterations,) = reference.values()
        return worst_snr([dict(iteration.items()) for iteration in iterations], results)
    except (PolygraphyException, KeyError, ValueError) as error:
        raise BuildError(f"{engine}: cannot be run on {inputs}: {error!r}") from error


def _check_profile(engine: Any, feed: Mapping[str, Any]) -> None:
    for name, array in feed.items():
        least, _, most = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
        if not all(low <= size <= high for low, size, high in zip(least, array.shape, most, strict=True)):
            raise BuildError(
                f"the saved input {name} is {list(array.shape)}, and the engine takes {list(least)} to {list(most)}; "
                "build with a --batch that includes it, or use --no-acceptance"
            )


def worst_snr(expected: list[dict[str, object]], found: list[dict[str, object]]) -> dict[str, float]:
    """The worst SNR in dB over the iterations of every output that both have, by polygraphy's comparator.

    Raises `ValueError` where they have none in common.
    """
    from polygraphy.comparator import Comparator, RunResults, SnrCompareFunc
    from polygraphy.logger import G_LOGGER

    common = set(expected[0]) & set(found[0]) if expected and found else set()
    if not common or len(expected) != len(found):
        raise ValueError("the engine and the reference have no output in common")
    results = RunResults()
    for name, iterations in (("reference", expected), ("engine", found)):
        results.add([{key: iteration[key] for key in common} for iteration in iterations], runner_name=name)
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        (accuracy,) = Comparator.compare_accuracy(results, compare_func=SnrCompareFunc())
    worst: dict[str, float] = {}
    for iteration in accuracy[("reference", "engine")]:
        for name, verdict in iteration.items():
            # A bare False stands for shapes that differ.
            snr = math.nan if isinstance(verdict, bool) else float(verdict.snr)
            known = worst.get(name, math.inf)
            worst[name] = math.nan if math.isnan(snr) or math.isnan(known) else min(known, snr)
    return worst
