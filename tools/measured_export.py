"""One export from scratch, whose stages' begin and end (time.monotonic) are written as JSON: [[stage, begin, end], …].

`python -m tools.measured_export RECIPE OUTPUT TARGET SPANS`
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

from rich.console import Console

from exporter import export, load_recipe
from exporter.job import STAGE_BEGINS, STAGE_ENDS
from exporter.progress import RichProgress


class _Spans(logging.Handler):
    """Notes when stages begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.spans: list[tuple[str, float, float]] = []
        self._begin = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == STAGE_BEGINS:
            self._begin = time.monotonic()
        elif record.msg == STAGE_ENDS and isinstance(record.args, tuple):
            self.spans.append((str(record.args[0]), self._begin, time.monotonic()))


def main() -> int:
    """Export and write the spans."""
    recipe, output, target, spans_file = sys.argv[1:]
    spans = _Spans()
    logger = logging.getLogger("exporter.job")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(spans)
    work = Path(f"{output}.work")
    export(
        load_recipe(recipe, target=target),
        output,
        work_dir=work,
        fresh=True,
        progress=RichProgress(Console(stderr=True)),
    )
    Path(spans_file).write_text(json.dumps(spans.spans), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
