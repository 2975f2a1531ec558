"""Write the README's table of number formats from `plugins.formats`, so that it cannot drift from the code.

`python -m tools.format_table` rewrites README.md between the two markers; `--check` only compares, exit code 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from plugins.containers import CONTAINERS, fits, multipliers
from plugins.formats import ACTIVATION_FORMATS, FORMATS, WEIGHT_FORMATS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- formats: written by tools/format_table.py -->", "<!-- end of formats -->"


def table() -> str:
    """The Markdown table, one row per format that a recipe can name."""
    lines = [
        "| format | bits | largest value ÷ step | weights | activations | exact in INT8 | exact in FP8 | foldable × |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys((*WEIGHT_FORMATS, *ACTIVATION_FORMATS)):
        fmt = FORMATS[name]
        factors = multipliers(fmt, CONTAINERS["int8"])
        cells = (
            f"`{name}`",
            fmt.bits,
            f"{fmt.max / fmt.step:g}",
            _yes(name in WEIGHT_FORMATS),
            _yes(name in ACTIVATION_FORMATS),
            _yes(fits(fmt, CONTAINERS["int8"])),
            _yes(fits(fmt, CONTAINERS["fp8"])),
            f"1…{factors[-1]}" if name in WEIGHT_FORMATS and len(factors) > 1 else "–",
        )
        lines.append(f"| {' | '.join(str(cell) for cell in cells)} |")
    return "\n".join(lines)


def with_table(readme: str) -> str:
    """The README's text with the table between its markers."""
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{table()}\n{END}{after}"


def _yes(condition: bool) -> str:
    return "yes" if condition else "–"


def main() -> int:
    """Rewrite or check README.md; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    current = README.read_text(encoding="utf-8")
    wanted = with_table(current)
    if options.check:
        return int(current != wanted)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
