"""Parts of a page that tools write, between two comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from exporter.files import write_text_atomically


def replace_section(page: Path, name: str, section: str) -> None:
    """Put `section` between the comments that name it, at the page's end where it has none yet."""
    text = page.read_text(encoding="utf-8")
    start, end = markers(name)
    if start not in text:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    write_text_atomically(page, f"{before}{start}\n{section}\n{end}{after}")


def markers(name: str) -> tuple[str, str]:
    """The comments before and after the section of this name."""
    return f"<!-- {name} -->", f"<!-- end of {name} -->"


def marked_sections(page: Path) -> list[str]:
    """All marked sections of the page, their comments included, in order."""
    pattern = r"<!-- (?P<name>[^>]+) -->\n.*?<!-- end of (?P=name) -->"
    return [match.group() for match in re.finditer(pattern, page.read_text(encoding="utf-8"), re.DOTALL)]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells, without a line's end behind it."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
