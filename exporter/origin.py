"""Where a finished output came from, so that it can be validated again: NAME.SUFFIX.origin.json beside it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from exporter.errors import InputError
from exporter.files import sha256_of, write_text_atomically
from exporter.gate.records import TENSORS
from exporter.onnx_files import checksum_of

_ENDING = ".origin.json"


@dataclass(frozen=True)
class Origin:
    """The work folder of an output, the compared graph and the gate folder in there, and checksums of all three.

    `reference_sha256` is that of the gate's reference, None without validation.
    """

    work_dir: str
    compared: str
    gate_folder: str
    compared_sha256: str
    output_sha256: str
    reference_sha256: str | None

    @classmethod
    def of(cls, output: Path, compared: Path, gate: Path | None) -> Origin:
        """What to remember of a finished `output`; `gate` is None when it was not validated."""
        checksum = None if gate is None else sha256_of(gate / TENSORS)
        work = compared.absolute().parent
        folder = gate.name if gate else ""
        return cls(str(work), compared.name, folder, checksum_of(compared), checksum_of(output), checksum)

    def save(self, output: Path) -> None:
        """Write it beside `output`."""
        write_text_atomically(origin_path(output), json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, output: Path) -> Origin:
        """Read what stands beside `output`, for a comparison with the reference it names.

        Raises `InputError` as `read`, and when there is no reference, or the work folder now holds another export.
        """
        origin = cls.read(output)
        if origin.reference_sha256 is None:
            raise InputError(
                f"{output}: there is no reference to validate it with: it was exported with --no-validate, or made "
                "from an ONNX model; run its export again"
            )
        needed = {origin.gate / TENSORS: origin.reference_sha256}
        if output.suffix != ".onnx":
            needed[origin.graph] = origin.compared_sha256
        if any(not file.is_file() or checksum_of(file) != checksum for file, checksum in needed.items()):
            raise InputError(f"{output}: its work folder {origin.work_dir} holds another export by now; export again")
        return origin

    @classmethod
    def read(cls, output: Path) -> Origin:
        """Read what stands beside `output`; a work folder that was moved along with the output is found, too.

        Raises `InputError` when there is no origin, or its work folder is gone.
        """
        file = origin_path(output)
        try:
            origin = cls(**json.loads(file.read_text(encoding="utf-8")))
            work = next(p for p in (output.parent / Path(origin.work_dir).name, Path(origin.work_dir)) if p.is_dir())
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such file; validate takes an output that fp4export wrote") from error
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{file}: cannot be read: {error}; export again") from error
        except StopIteration as error:
            raise InputError(f"{output}: its work folder {origin.work_dir} is gone; export again") from error
        return replace(origin, work_dir=str(work))

    @property
    def gate(self) -> Path:
        """The gate's folder."""
        return Path(self.work_dir) / self.gate_folder

    @property
    def graph(self) -> Path:
        """The graph that stands for the output in comparisons."""
        return Path(self.work_dir) / self.compared


def origin_path(output: Path) -> Path:
    """Where an output's origin is."""
    return output.with_name(output.name + _ENDING)
