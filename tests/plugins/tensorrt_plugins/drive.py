"""Takes plugins through all that TensorRT's builder asks of them, in a process of its own.

`python -m tests.plugins.tensorrt_plugins.drive SHIMS JOB`: JOB is JSON, as is the last line of what it prints.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.plugins.tensorrt_plugins.expressions import Numbers, Scalars, launch_parameters

# The one that others are linked to comes first.
_ORDER = ("nvinfer.so", "nvinfer_plugin.so", "nvonnxparser.so")


def load_tensorrt(shims: Path) -> Any:
    """Import the bindings as `tensorrt`, with the shims in the place of TensorRT's libraries."""
    for name in _ORDER:
        (library,) = shims.glob(f"lib{name}.*")
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    sys.modules["tensorrt"] = importlib.import_module("tensorrt_bindings")
    return sys.modules["tensorrt"]


def drive(trt: Any, op_type: str, inputs: list[list[int]]) -> dict[str, Any]:
    """Create the plugin through its creator in the registry, as the ONNX parser does, and build with it."""
    from plugins.tensorrt_plugins.variant import plugin_variant

    variant = plugin_variant(op_type)
    creator = trt.get_plugin_registry().get_creator(op_type, "1", "fp4export")
    # The parser passes those of a node's attributes that the creator names.
    fields = [field.name for field in creator.field_names]
    plugin = creator.create_plugin(
        op_type,
        "fp4export",
        trt.PluginFieldCollection([]),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.STRICT_AOT,
    )
    types = [_types(trt)[element] for element in variant.input_types.values()]
    outputs = plugin.get_output_data_types(types, [len(sizes) for sizes in inputs])
    numbers = Numbers(trt)
    shapes = plugin.get_output_shapes([numbers.dimensions(sizes) for sizes in inputs], [], numbers)
    sizes = [[numbers.value(shape[axis]) for axis in range(len(shape))] for shape in shapes]
    described = [
        _described(trt, kind, shape) for kind, shape in zip([*types, *outputs], [*inputs, *sizes], strict=True)
    ]
    supported = plugin.get_supported_format_combinations(described, len(inputs))
    plugin.configure_plugin(described[: len(inputs)], described[len(inputs) :])
    tactics = plugin.get_valid_tactics()
    return {
        "creator": [creator.name, creator.plugin_version, creator.plugin_namespace],
        "fields": fields,
        "aot": isinstance(plugin, trt.IPluginV3QuickAOTBuild),
        "output_types": [kind.name for kind in outputs],
        "output_shapes": sizes,
        "supported": [[desc.type.name, desc.format.name] for desc in supported],
        "tactics": {tactic: _launch(plugin, tactic, described, len(inputs), numbers) for tactic in sorted(tactics)},
    }


def _launch(plugin: Any, tactic: int, described: list[Any], count: int, numbers: Numbers) -> dict[str, Any]:
    plugin = plugin.clone()
    plugin.set_tactic(tactic)
    parameters, scalars = launch_parameters(), Scalars()
    plugin.get_launch_params([], described, count, parameters, scalars, numbers)
    static = [desc.desc for desc in described]
    name, ptx = plugin.get_kernel(static[:count], static[count:])
    return {
        "kernel": name,
        "ptx": ptx.decode(),
        "parameters": {key: numbers.value_in(value) for key, value in vars(parameters).items()},
        "scalars": [numbers.value_in(scalar) for _, scalar in sorted(scalars.symbols.items())],
    }


def _types(trt: Any) -> dict[int, Any]:
    from onnx import TensorProto

    kinds = trt.DataType
    return {
        TensorProto.FLOAT: kinds.FLOAT,
        TensorProto.FLOAT16: kinds.HALF,
        TensorProto.BFLOAT16: kinds.BF16,
        TensorProto.INT8: kinds.INT8,
        TensorProto.INT32: kinds.INT32,
        TensorProto.FLOAT8E4M3FN: kinds.FP8,
    }


def _described(trt: Any, kind: Any, sizes: list[int]) -> Any:
    described = trt.DynamicPluginTensorDesc()
    described.desc.type, described.desc.format = kind, trt.TensorFormat.LINEAR
    described.desc.dims = trt.Dims(sizes)
    described.min = described.max = described.opt = trt.Dims(sizes)
    return described


def main(shims: str, job: dict[str, Any]) -> Any:
    """What became of the plugins of `inputs`, or how `register` refuses `refused` and what it has registered then.

    `version` makes these bindings say that they are older; `twice` registers once before. `engine`: what is registered
    when the build of that `EngineJob` comes to the parser.
    """
    trt = load_tensorrt(Path(shims))
    if "engine" in job:
        return _registered_before_parsing(trt, job["engine"])
    from plugins.kernels.library import KernelLibrary
    from plugins.tensorrt_plugins.registration import register

    library, capability = KernelLibrary.load(job["library"]), tuple(job["capability"])
    if "inputs" in job:
        register(job["inputs"], library, capability)
        return {op_type: drive(trt, op_type, shapes) for op_type, shapes in job["inputs"].items()}
    if job.get("twice"):
        register(job["refused"], library, capability)
    trt.__version__ = job.get("version", trt.__version__)
    try:
        register(job["refused"], library, capability)
    except (RuntimeError, ValueError) as error:
        return str(error), _registered(trt)
    return "", []


def _registered(trt: Any) -> list[str]:
    creators = trt.get_plugin_registry().all_creators
    return [creator.name for creator in creators if creator.plugin_namespace == "fp4export"]


def _registered_before_parsing(trt: Any, job: str) -> list[str]:
    """The bindings have no builder: a stand-in's parser looks into the real registry."""
    from exporter.device.jobs import EngineJob
    from exporter.device.tensorrt_api import build_engine
    from tests.exporter.device.fake_tensorrt import fake_tensorrt

    builder = fake_tensorrt()
    found: list[str] = []

    class Parser(builder.OnnxParser):  # type: ignore[name-defined,misc]
        def parse_from_file(self, path: str) -> bool:
            found.extend(_registered(trt))
            return bool(super().parse_from_file(path))

    builder.OnnxParser = Parser
    build_engine(builder, EngineJob.from_json(job), lambda _kind, **_facts: None)
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))) + "\n")
