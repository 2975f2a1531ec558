"""What a bisection found, as data and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from exporter.bisect.free_run import FreeRun
from exporter.bisect.look import Look
from exporter.bisect.parts import Part
from exporter.bisect.trial import Trial
from exporter.gate.table import GateRow, Stage


@dataclass(frozen=True)
class Findings:
    """What `free` running shows, the graph's places given the reference's inputs (`look`), and every quantized linear
    in the same way.

    `place` is the first block, or what lies before or after the blocks, in which something deviates; "" where nothing
    does. `trials` say what FP32 in the deviating linears does, `part` which operators deviate outside them.
    """

    file: str
    stage: Stage
    target: str
    free: FreeRun
    look: Look
    linears: tuple[GateRow, ...]
    place: str
    part: Part | None
    trials: tuple[Trial, ...]
    notes: tuple[str, ...]

    @property
    def guilty_linears(self) -> tuple[GateRow, ...]:
        """The quantized linears that deviate, in the graph's order."""
        return tuple(row for row in self.linears if not row.passed)

    @property
    def clean(self) -> bool:
        """Whether the graph computes what the reference computes."""
        return self.look.right and not self.guilty_linears

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.clean:
            return "the graph computes what the reference computes: nothing to find"
        guilty = self.guilty_linears
        if guilty:
            more = "" if len(guilty) == 1 else f", and {len(guilty) - 1} more: {_listed(guilty[1:])}"
            return f"layer {guilty[0].name} deviates: {guilty[0].detail}{more}"
        if self.part is not None:
            return (
                f"all quantized linears are right; what deviates in {self.part.place} are the operators between "
                f"{', '.join(self.part.after)} and {self.part.before}: {', '.join(self.part.operators)}"
            )
        return f"no block deviates by itself, but {self.look.end_to_end.sentence()}"

    def to_json(self) -> str:
        """One indented JSON document with the same names, and what follows from them."""
        document = {
            "clean": self.clean,
            "verdict": self.verdict,
            "guilty_linears": [row.name for row in self.guilty_linears],
            "rules": list(self.trials[-1].rules) if self.trials else [],
            **asdict(self),
        }
        return json.dumps(document, indent=1)


_MOST_LISTED = 3


def _listed(rows: Sequence[GateRow]) -> str:
    names = [row.name for row in rows[:_MOST_LISTED]]
    return ", ".join(names) + (", …" if len(rows) > _MOST_LISTED else "")
