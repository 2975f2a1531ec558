"""Progress without rich: the plain bar, and TensorRT's nested phases as one bar at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

from exporter.device.child import PhaseBar
from exporter.device.terminal import PlainProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_that_vanishes() -> None:
    stream = Terminal()
    progress = PlainProgress(stream)
    with progress.task("building", 2) as task:
        task.advance()
        task.advance()
    progress.note("done")
    text = stream.getvalue()
    assert "building [........................] 0/2" in text
    assert "building [########################] 2/2" in text
    assert text.endswith("\r\x1b[Kdone\n")


def test_a_pipe_gets_notes_alone_and_quiet_nothing() -> None:
    pipe = io.StringIO()
    for quiet, expected in ((False, "note\n"), (True, "note\n")):
        progress = PlainProgress(pipe, quiet=quiet)
        with progress.task("building", 2) as task:
            task.advance(5)
        progress.note("note")
        assert pipe.getvalue() == expected
    terminal = Terminal()
    with PlainProgress(terminal, quiet=True).task("building", 1):
        pass
    assert terminal.getvalue() == ""


class Recorder:
    """What is shown: ("open", title, total), ("advance", steps), ("close", title)."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def note(self, line: str) -> None:
        self.seen.append(("note", line))

    def advance(self, steps: int = 1) -> None:
        if steps:
            self.seen.append(("advance", steps))

    @contextmanager
    def task(self, title: str, total: int) -> Iterator[Recorder]:
        self.seen.append(("open", title, total))
        yield self
        self.seen.append(("close", title))


def test_the_innermost_phase_is_shown_and_the_outer_one_comes_back_where_it_was() -> None:
    shown = Recorder()
    with PhaseBar(shown, "b") as bar:
        bar.update({"kind": "start", "phase": "outer", "steps": 3})
        bar.update({"kind": "step", "phase": "outer", "done": 1})
        bar.update({"kind": "start", "phase": "inner", "steps": 5})
        bar.update({"kind": "step", "phase": "inner", "done": 2})
        bar.update({"kind": "step", "phase": "outer", "done": 2})
        bar.update({"kind": "finish", "phase": "inner"})
    assert shown.seen == [
        ("open", "b: outer", 3),
        ("advance", 1),
        ("close", "b: outer"),
        ("open", "b: inner", 5),
        ("advance", 2),
        ("close", "b: inner"),
        ("open", "b: outer", 3),
        ("advance", 2),
        ("close", "b: outer"),
    ]


def test_phases_that_end_out_of_order_or_were_never_begun_do_no_harm() -> None:
    shown = Recorder()
    with PhaseBar(shown, "b") as bar:
        bar.update({"kind": "step", "phase": "unknown", "done": 1})
        bar.update({"kind": "finish", "phase": "unknown"})
        bar.update({"kind": "start", "phase": "outer", "steps": 0})
        bar.update({"kind": "start", "phase": "inner", "steps": 1})
        bar.update({"kind": "finish", "phase": "outer"})
        bar.update({"kind": "finish", "phase": "inner"})
    assert [entry[0] for entry in shown.seen] == ["open", "close", "open", "close"]
