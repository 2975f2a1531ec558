"""What a bisection of an engine found, as data and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from exporter.bisect.free_run import FreeRun
from exporter.bisect.trial import Trial
from exporter.gate.table import GateRow


@dataclass(frozen=True)
class LayerTrials:
    """One block built alone: the SNR of its output in dB as it is, and one trial per linear, then one of all of them,
    in FP32."""

    alone_db: float
    needed_db: float
    trials: tuple[Trial, ...]

    @property
    def reproduced(self) -> bool:
        """Whether the block deviates alone, too."""
        return not self.alone_db >= self.needed_db

    @property
    def healing(self) -> tuple[Trial, ...]:
        """The layers of which one alone in FP32 is enough, else all of them if that is; best first."""
        if not self.reproduced:
            return ()
        *single, every = self.trials
        found = sorted((one for one in single if one.goes_away), key=lambda one: -one.effects[0].after_db)
        return tuple(found) or ((every,) if every.goes_away else ())


@dataclass(frozen=True)
class EngineFindings:
    """`free`: the engine's boundaries against the PyTorch reference; `blocks`: every part of the engine against its
    graph in ONNX Runtime, given the inputs that the engine itself gave it.

    `layers` is None where no block deviates, or its layers have not been tried; `notes` say then what is missing.
    """

    file: str
    target: str
    free: FreeRun
    blocks: tuple[GateRow, ...]
    layers: LayerTrials | None
    notes: tuple[str, ...]

    @property
    def first(self) -> GateRow | None:
        """The first part that deviates."""
        return next((row for row in self.blocks if not row.passed), None)

    @property
    def place(self) -> str:
        """Its name; "" where none does."""
        return "" if self.first is None else self.first.name

    @property
    def clean(self) -> bool:
        """Whether the engine computes what its graph and the reference compute."""
        output = self.free.rows[-1]
        return self.first is None and output.snr_db >= self.free.limit_db

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.clean:
            return "with its boundaries as outputs, every part of the engine computes what its graph computes"
        if self.first is None:
            output = self.free.rows[-1]
            return (
                f"every part of the engine computes what its graph computes, but its output has {output.snr_db:.1f} dB "
                f"of the {self.free.limit_db:.1f} that are needed: bisect the graph"
            )
        found = self.first
        what = "block" if found.kind == "block" else "what makes"
        sentence = f"{what} {found.name} deviates: SNR {found.snr_db:.1f} dB, {found.threshold_db:.1f} needed"
        later = sum(not row.passed for row in self.blocks) - 1
        sentence += f", and {later} more after it" if later else ""
        return sentence if self.layers is None else f"{sentence}; {_of_layers(self.layers)}"

    def to_json(self) -> str:
        """One indented JSON document with the same names, and what follows from them."""
        healing = () if self.layers is None else self.layers.healing
        document = {
            "clean": self.clean,
            "verdict": self.verdict,
            "place": self.place,
            "guilty_linears": [layer for trial in healing for layer in trial.layers],
            "rules": [rule for trial in healing[:1] for rule in trial.rules],
            **asdict(self),
        }
        return json.dumps(document, indent=1)


def _of_layers(layers: LayerTrials) -> str:
    if not layers.reproduced:
        return "built alone, the block is right: the fault lies in what the builder makes of it with its neighbours"
    if not layers.healing:
        return "not right with all its linears in FP32 either: the fault lies between them (attention, norms, gates)"
    best = layers.healing[0]
    if len(best.layers) > 1:
        return "right only with all its linears in FP32"
    return f"right with {best.layers[0]} in FP32"
