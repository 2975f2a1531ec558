"""Processes that work together: none waits for one that has ended, or that it cannot find."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.shards import Shard

ROOT = Path(__file__).parents[2]
# Both meet once; then the last one ends without a word.
LEFT_ALONE = """
import os
from exporter.errors import EnvironmentLacksError
from exporter.shards import Shard

shard = Shard.of_environment()
with shard.joined():
    shard.wait()
    if shard.rank == 1:
        os._exit(0)
    try:
        shard.agree(True)
    except EnvironmentLacksError as error:
        print(error)
"""


# Two processes with the same key, and with keys of their own.
UNLIKE = """
from exporter.errors import InputError
from exporter.shards import Shard

shard = Shard.of_environment()
with shard.joined():
    for key in ("0123456789abcdef", f"{shard.rank + 10:x}123456789abcdef"):
        try:
            shard.check_alike(key)
            print("alike")
        except InputError as error:
            print(error)
"""


def test_who_waits_for_a_process_that_has_ended_is_told_so() -> None:
    first, second = _both(LEFT_ALONE)
    assert second.wait() == 0
    assert "process 0 of 2: another process has ended" in first.communicate()[0]
    assert first.returncode == 0


def test_processes_with_other_settings_are_told_so() -> None:
    for rank, process in enumerate(_both(UNLIKE)):
        alike, told = process.communicate()[0].splitlines()
        assert alike == "alike"
        assert told.startswith(f"process {rank} of 2 is not like the others: all need the same recipe")


def _both(code: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **place, "RANK": rank, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]


def test_several_processes_that_cannot_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"WORLD_SIZE is 2, but .*MASTER_ADDR.* torchrun"), Shard(0, 2).joined():
        pass
