"""A tool rewrites its own part of a page and nothing else."""

from __future__ import annotations

from pathlib import Path

from tools.marked_section import marked_sections, replace_section

PAGE = """# Title

before
<!-- one -->
old
<!-- end of one -->
between
<!-- two -->
kept
<!-- end of two -->
after
"""


def test_a_section_is_replaced_where_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    replace_section(page, "one", "new\nlines")
    assert page.read_text() == PAGE.replace("old", "new\nlines")


def test_replacing_twice_is_replacing_once(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    replace_section(page, "two", "new")
    once = page.read_text()
    replace_section(page, "two", "new")
    assert page.read_text() == once


def test_a_new_section_goes_to_the_end(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    replace_section(page, "three", "third")
    assert page.read_text() == f"{PAGE}\n<!-- three -->\nthird\n<!-- end of three -->\n"


def test_sections_are_found_in_order_with_their_comments(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert marked_sections(page) == [
        "<!-- one -->\nold\n<!-- end of one -->",
        "<!-- two -->\nkept\n<!-- end of two -->",
    ]
