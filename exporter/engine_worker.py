"""One TensorRT build, run as a process of its own: `python -m exporter.engine_worker JOB`, JOB as JSON.

A parser that meets what it does not know may end its process; what the main job has finished must outlive that.
Messages go to the error stream; the result, one line of JSON, to the output stream.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass

RESULT_START = '{"version"'


@dataclass(frozen=True)
class EngineJob:
    """What to build: an ONNX file into an engine file, with shapes (min, opt, max) of the dynamic inputs.

    `compute_capability` is (major, minor) for TensorRT-RTX, which builds for GPUs that are not there, else None.
    """

    onnx: str
    engine: str
    rtx: bool
    compute_capability: tuple[int, int] | None
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]

    def to_json(self) -> str:
        """The job as an argument of this module's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EngineJob:
        """The inverse of `to_json`."""
        facts = json.loads(text)
        capability = facts["compute_capability"]
        shapes = {
            name: (tuple(least), tuple(best), tuple(most)) for name, (least, best, most) in facts["shapes"].items()
        }
        return cls(
            facts["onnx"], facts["engine"], facts["rtx"], (capability[0], capability[1]) if capability else None, shapes
        )


def build(job: EngineJob) -> str:
    """Build and save the engine; the builder's version. Raises polygraphy's errors."""
    from polygraphy.backend.trt import CreateConfig, EngineBytesFromNetwork, NetworkFromOnnxPath, Profile

    profile = Profile()
    for name, (least, best, most) in job.shapes.items():
        profile.add(name, min=least, opt=best, max=most)
    if job.rtx:
        import tensorrt_rtx as trt
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        config = CreateConfigRTX(compute_capabilities=[job.compute_capability], profiles=[profile])
    else:
        import tensorrt as trt

        config = CreateConfig(profiles=[profile])
    network = NetworkFromOnnxPath(job.onnx, strongly_typed=not job.rtx)
    engine = EngineBytesFromNetwork(network, config=config)()
    with open(job.engine, "wb") as file:
        file.write(bytes(engine))
    if not job.rtx:
        _load(bytes(engine))
    return str(trt.__version__)


def _load(engine: bytes) -> None:
    """Deserialize on the GPU that it was built on. Raises polygraphy's errors."""
    from polygraphy.backend.trt import EngineFromBytes

    EngineFromBytes(engine)()


def main() -> int:
    """Run the job in the first argument; 0 when the engine is there."""
    job = EngineJob.from_json(sys.argv[1])
    # Read once, when polygraphy is imported: it decides which of the two TensorRTs polygraphy drives.
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(job.rtx))
    from polygraphy.exception import PolygraphyException

    try:
        version = build(job)
    except (PolygraphyException, OSError) as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    sys.stdout.write(json.dumps({"version": version}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
