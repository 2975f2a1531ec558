"""The checksums that a device leaves with what it recorded: of the recording, and of the graph that it was made for."""

from __future__ import annotations

from pathlib import Path

from exporter.errors import InputError
from exporter.files import sha256_of


def checksums_path(recording: Path) -> Path:
    """The file of checksums beside a recording, NAME.outputs.sha256 beside NAME.outputs.json."""
    return recording.with_suffix(".sha256")


def checksums_command(recording: Path, graph_sha256: str) -> str:
    """The shell's line that writes the checksums; it takes sha256sum, which every Linux has."""
    lines = f"printf 'graph %s\\nrecording %s\\n' {graph_sha256} \"$sum\""
    return f"sum=$(sha256sum < {recording.name}) && {lines} > {checksums_path(recording).name}"


def check_recording(recording: Path, graph_sha256: str) -> None:
    """Raise `InputError` unless `recording` is as the device left it, and of the graph with this checksum."""
    file = checksums_path(recording)
    if not recording.is_file():
        raise InputError(f"{recording}: no such file; copy it and {file.name} back from the device")
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8").splitlines()]
        sums = {words[0]: words[1] for words in lines}
        graph, content = sums["graph"], sums["recording"]
    except FileNotFoundError:
        raise InputError(f"{recording}: {file.name}, which the device left with it, is missing; copy both") from None
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{file}: not the checksums that the device left; copy it again") from error
    if content != sha256_of(recording):
        raise InputError(f"{recording}: is not what the device recorded (its SHA-256 differs); copy it again")
    if graph != graph_sha256:
        raise InputError(f"{recording}: was recorded of another export; run the script of this one on the device")
