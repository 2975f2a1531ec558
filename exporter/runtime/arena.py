"""One arena of memory for many sessions: what one has given back is the next one's, its pages touched already.

With an arena of its own every session has the system clear new pages, and without any every run has. A large graph is
run in more than a hundred sessions, which spent much of their time so.
"""

from __future__ import annotations

from functools import cache
from threading import Lock

import onnxruntime as ort

# Exactly as much as is asked for, instead of the next power of two.
_SAME_AS_REQUESTED = 1
_BEGINNING = Lock()


def share_arena(options: ort.SessionOptions) -> None:
    """Let a session with these `options` take its memory from the process's one arena."""
    # Threads may begin with it together, and ONNX Runtime reads its list of arenas without a lock.
    with _BEGINNING:
        _first_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")


def renew_arena() -> None:
    """Begin a new arena; the old one's memory goes back to the system with the last session that uses it.

    No other thread may be opening a session.
    """
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({"arena_extend_strategy": _SAME_AS_REQUESTED}))


@cache
def _first_arena() -> None:
    renew_arena()
