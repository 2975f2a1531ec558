"""Write the documentation's tables of containers from the code that chooses them, so that it cannot drift from it.

`python -m tools.container_table` rewrites docs/recipes.md between the two markers; `--check` only compares (exit 1).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path

from exporter.container_choice import choose_container
from exporter.errors import InputError
from exporter.presets import PRESETS, LayerScheme
from exporter.targets import TARGETS, Target

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
START, END = "<!-- containers: written by tools/container_table.py -->", "<!-- end of containers -->"
# The widest rows of the shipped models: what is exact there is exact everywhere.
WIDEST = 4608


def container(scheme: LayerScheme, target: Target) -> str:
    """The container's name, a dash where the target refuses the scheme."""
    try:
        return choose_container("", scheme, WIDEST, target)
    except InputError:
        return "–"


def tables() -> str:
    """The Markdown tables of TensorRT's own kernels (and ONNX Runtime's) and of plugins."""
    plugins = [target.with_kernels("plugin") for target in TARGETS.values() if target.plugin_containers]
    return f"{table(TARGETS.values())}\n\nWith `kernels: plugin`:\n\n{table(plugins)}"


def table(machines: Iterable[Target]) -> str:
    """One row per preset, one column per run of neighbouring targets that agree on all of them."""
    columns = []
    for choices, targets in groupby(
        machines, lambda target: (target.engine, *(container(scheme, target) for scheme in PRESETS.values()))
    ):
        columns.append((", ".join(target.name for target in targets), choices[1:]))
    lines = [
        f"| preset | {' | '.join(f'`{name}`'.replace(', ', '`, `') for name, _ in columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for index, preset in enumerate(PRESETS):
        lines.append(f"| `{preset}` | {' | '.join(choices[index] for _, choices in columns)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """The page's text with the tables between its markers."""
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{tables()}\n{END}{after}"


def main() -> int:
    """Rewrite or check docs/recipes.md; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only")
    options = parser.parse_args()
    current = PAGE.read_text(encoding="utf-8")
    wanted = with_table(current)
    if options.check:
        return int(current != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
