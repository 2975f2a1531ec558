"""The errors a user can meet, each with the exit code it ends the command with.

A message is one line: what is wrong, where, the nearest valid value, what to do. The command prints it after
``error: ``; as a library, catch `Fp4ExportError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import takewhile

_SIMILAR = 0.6
_SHORTEST_PREFIX = 3
_MOST_LISTED = 12


class Fp4ExportError(Exception):
    """Anything that ends an export with a message instead of a traceback."""

    exit_code: int = 2


class InputError(Fp4ExportError):
    """A recipe, a file, a flag or an output path that cannot be used as it is."""

    exit_code = 2


class EnvironmentLacksError(Fp4ExportError):
    """A package, a driver, a device or a network that this machine does not have."""

    exit_code = 3


class FidelityError(Fp4ExportError):
    """The validation ran and the exported model does not compute what the reference computes."""

    exit_code = 4


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate most like `word`, else one that it begins, or None when none is alike.

    Ties go to the longest common prefix, then to the smallest distance between the characters, so that
    ``e2m4`` suggests ``e2m3`` and not ``e3m4``.
    """

    def likeness(candidate: str) -> tuple[float, int, int]:
        ratio = difflib.SequenceMatcher(None, word.lower(), candidate.lower()).ratio()
        pairs = list(zip(word, candidate, strict=False))
        prefix = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return ratio, prefix, -sum(abs(ord(a) - ord(b)) for a, b in pairs)

    known = list(candidates)
    best = max(known, key=likeness, default=None)
    if best is not None and likeness(best)[0] >= _SIMILAR:
        return best
    longer = [candidate for candidate in known if candidate.lower().startswith(word.lower())]
    return longer[0] if longer and len(word) >= _SHORTEST_PREFIX else None


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """The end of an "unknown …" message: ``; did you mean 'e2m3'?``, or ``; valid: …``."""
    known = list(candidates)
    if not known:
        return ""
    alike = nearest(word, known)
    if alike is not None:
        return f"; did you mean {alike!r}?"
    listed = ", ".join(known[:_MOST_LISTED])
    return f"; valid: {listed}" + (f", … ({len(known)} in all)" if len(known) > _MOST_LISTED else "")
