"""Exported files in onnxruntime-gpu, against the same files on the CPU. Skipped without a GPU or that package."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper, save
from torch import Tensor

from exporter.errors import Fp4ExportError
from exporter.gate.snr import snr_db
from exporter.runtime import EngineTransformer
from exporter.runtime.onnxruntime_engine import OnnxRuntimeEngine
from tests.exporter.runtime.test_transformer import call_of, draw

CUDA = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or CUDA not in ort.get_available_providers(),
        reason="needs an NVIDIA GPU and onnxruntime-gpu, and one is not here",
    ),
]

SIZE = 96
CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP32_DB = 100
# Another order of sums moves an activation across the middle of two grid values now and then.
QUANTIZED_DB, DRAWN_DB = 35, 25


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """y = x · w · half + whole, with inputs of three types."""
    weight = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    types = {"x": TensorProto.FLOAT, "half": TensorProto.FLOAT16, "whole": TensorProto.INT64}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Cast", ["half"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["whole"], ["term"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["product", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "term"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(name, kind, ["batch", "rows", SIZE]) for name, kind in types.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "rows", SIZE])
    made = helper.make_graph(nodes, "g", inputs, [output], [numpy_helper.from_array(weight.numpy(), "w")])
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


def feeds(batch: int, rows: int) -> dict[str, Tensor]:
    x = torch.randn(batch, rows, SIZE, generator=torch.Generator().manual_seed(batch))
    return {"x": x, "half": (x.flip(0) + 2).half(), "whole": (3 * x).long()}


def db(wanted: Tensor, got: Tensor) -> float:
    return snr_db(wanted.numpy(), got.cpu().numpy())


def test_every_shape_computes_what_the_cpu_does_in_torchs_memory(graph: Path) -> None:
    on_cpu, on_gpu = OnnxRuntimeEngine(graph, CPU), OnnxRuntimeEngine(graph, GPU)
    assert on_gpu.device == torch.device("cuda", torch.cuda.current_device())
    for batch, rows in ((1, 5), (4, 64), (1, 5), (3, 1)):
        given = feeds(batch, rows)
        wanted, got = on_cpu.run(given), on_gpu.run(given)
        assert got.device == on_gpu.device
        assert db(wanted, got) > FP32_DB
        assert torch.equal(got, on_gpu.run({name: tensor.cuda() for name, tensor in given.items()}))
    assert len(on_gpu._bound) == 3
    bound = on_gpu._bound[((4, 64, SIZE),) * 3]
    assert {tensor.device for tensor in (*bound.inputs.values(), bound.output)} == {on_gpu.device}
    bound.inputs["half"].zero_()
    bound.inputs["whole"].fill_(7)
    bound.launch()
    assert bool((bound.output == 7).all())


@pytest.mark.parametrize("side", [False, True])
def test_what_the_current_stream_computes_is_seen(graph: Path, side: bool) -> None:
    engine = OnnxRuntimeEngine(graph, GPU)
    given = {name: tensor.cuda() for name, tensor in feeds(2, 8).items()}
    engine.run(given)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):  # type: ignore[no-untyped-call]
        for turn in range(1, 4):
            torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
            late = given["whole"] * 0 + turn
            zero = torch.zeros_like(given["half"])
            got = engine.run({**given, "half": zero, "whole": late})
            assert bool((got == turn).all())


def test_transformer_predicts_and_draws_as_on_the_cpu(tiny_job: Path, tiny_export: Path) -> None:
    on_cpu, on_gpu = EngineTransformer.load(tiny_export), EngineTransformer.load(tiny_export, device="cuda")
    for batch in (2, 1, 2):
        call = call_of(tiny_job, batch)
        got = on_gpu(**{name: tensor.cuda() for name, tensor in call.items()}).sample
        assert got.device == on_gpu.device
        assert db(on_cpu(**call).sample, got) > QUANTIZED_DB
    prompts = tiny_job / "prompts.safetensors"
    assert db(draw(on_cpu, prompts)[0], draw(on_gpu, prompts, device="cuda")[0]) > DRAWN_DB


def test_a_gpu_that_is_not_there_is_refused(graph: Path) -> None:
    with pytest.raises(Fp4ExportError, match=r"g\.onnx"):
        OnnxRuntimeEngine(graph, torch.device("cuda", torch.cuda.device_count()))
