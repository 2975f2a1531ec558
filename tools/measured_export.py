"""One export from scratch, whose stages' begin and end (time.monotonic) are written as JSON: [[stage, begin, end], …].

The file is written anew whenever a stage ends, so that a run that is broken off leaves what it had done.

`python -m tools.measured_export RECIPE OUTPUT TARGET SPANS [KEY=VALUE …]`
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path

from rich.console import Console

from exporter import export, load_recipe
from exporter.files import write_text_atomically
from exporter.job import STAGE_BEGINS, STAGE_ENDS
from exporter.progress import RichProgress


class _Spans(logging.Handler):
    """Writes into `file` when stages begin and end."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._spans: list[tuple[str, float, float]] = []
        self._begin = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == STAGE_BEGINS:
            self._begin = time.monotonic()
        elif record.msg == STAGE_ENDS and isinstance(record.args, tuple):
            self._spans.append((str(record.args[0]), self._begin, time.monotonic()))
            write_text_atomically(self._file, json.dumps(self._spans))


def main() -> int:
    """Export and write the spans."""
    recipe, output, target, spans, *overrides = sys.argv[1:]
    logger = logging.getLogger("exporter.job")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(_Spans(Path(spans)))
    work = Path(f"{output}.work")
    export(
        load_recipe(recipe, overrides, target),
        output,
        work_dir=work,
        fresh=True,
        progress=RichProgress(Console(stderr=True)),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
