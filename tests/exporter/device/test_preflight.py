"""What is refused before a build, and what each refusal offers instead."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from exporter.device.graph import LoweredGraph, is_plugin, read_lowered
from exporter.device.preflight import check_graph, check_kernels, check_version, parser_of
from exporter.device.requirements import oldest_version
from exporter.errors import EnvironmentLacksError, InputError
from exporter.passes import WAIST_PASSES, run_passes
from exporter.targets import TARGETS
from tests.exporter.device.lowered_graphs import write_library, write_lowered
from tests.exporter.passes.waist_graphs import make_weight, one_linear


@pytest.mark.parametrize(
    ("target", "version", "parser"),
    [
        ("orin", (10, 3), "10.3"),
        ("orin", (10, 16), "10.3"),
        ("orin", (11, 0), "11"),
        ("orin", (12, 1), "11"),
        ("rtx-sm89", (1, 7), "11"),
    ],
)
def test_a_version_s_parser_is_the_newest_known_that_is_not_newer(
    target: str, version: tuple[int, int], parser: str
) -> None:
    assert parser_of(TARGETS[target], version).name == parser


def test_targets_name_their_oldest_release() -> None:
    assert oldest_version(TARGETS["orin"]) == (10, 3)
    assert oldest_version(TARGETS["thor"]) == (11, 0)
    assert oldest_version(TARGETS["rtx-sm89"]) == (1, 3)


def test_a_lowered_graph_passes_on_its_own_target_and_on_others_that_can(tmp_path: Path) -> None:
    for target, version in (("orin", (10, 3)), ("h100", (11, 4)), ("rtx-sm86", (1, 7))):
        graph = read_lowered(write_lowered(tmp_path, target))
        assert graph.lowered_for is TARGETS[target]
        assert [layer.layer for layer in graph.layers] == ["fc"]
        assert graph.kernels is None
        check_graph(graph, TARGETS[target], version)
        check_kernels(graph, TARGETS[target])
        check_version(graph, version)
        check_graph(graph, TARGETS["l4"], (11, 4))


def test_a_container_that_the_gpu_has_not_is_refused_by_the_layer_s_name(tmp_path: Path) -> None:
    graph = read_lowered(write_lowered(tmp_path, "h100", "e4m3"))
    with pytest.raises(InputError, match=r"layer fc is in container fp8, which target orin .* that do: .*l4, h100"):
        check_graph(graph, TARGETS["orin"], (11, 4))


def test_an_operator_that_this_parser_lacks_is_named(tmp_path: Path) -> None:
    path = write_lowered(tmp_path, "orin")
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Swish", ["fc/y"], ["z"], name="late"))
    onnx.save(model, path)
    graph = read_lowered(path)
    check_graph(graph, TARGETS["orin"], (11, 4))
    with pytest.raises(InputError, match=r"node 'late': target orin cannot run operator Swish: .* TensorRT 10\.3 does"):
        check_graph(graph, TARGETS["orin"], (10, 3))


def test_a_type_that_the_parser_does_not_take_is_named(tmp_path: Path) -> None:
    path = write_lowered(tmp_path, "orin")
    model = onnx.load(path)
    model.graph.node.append(helper.make_node("Cast", ["fc/y"], ["z"], name="wide", to=TensorProto.DOUBLE))
    model.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.DOUBLE, None))
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"node 'wide': .*'z' of type DOUBLE"):
        check_graph(read_lowered(path), TARGETS["orin"], (11, 4))


def test_fp32_products_are_refused_where_the_builder_has_none(tmp_path: Path) -> None:
    graph = read_lowered(write_lowered(tmp_path, "rtx-sm80"))
    with pytest.raises(InputError, match="--target rtx-sm75 --set compute=fp16"):
        check_graph(graph, TARGETS["rtx-sm75"], (1, 7))


def _waist(folder: Path) -> Path:
    model, _ = run_passes(one_linear(make_weight("fc")), WAIST_PASSES, TARGETS["orin"])
    path = folder / "exported.orin.onnx"
    onnx.save(model, path)
    return path


def test_a_waist_graph_says_what_to_build_instead(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has FloatGemm_.*not lowered yet; build lowered\.TARGET\.onnx"):
        read_lowered(_waist(tmp_path))


def test_a_foreign_graph_says_what_makes_a_lowered_one(tmp_path: Path) -> None:
    node = helper.make_node("Abs", ["x"], ["y"])
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(helper.make_model(helper.make_graph([node], "g", value[:1], value[1:])), tmp_path / "f.onnx")
    with pytest.raises(InputError, match=r"not a graph that fp4export lowered; .*--format e2m1"):
        read_lowered(tmp_path / "f.onnx")


def test_a_graph_for_onnx_runtime_needs_no_engine(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="was lowered for ONNX Runtime"):
        read_lowered(write_lowered(tmp_path, "cpu"))


@pytest.mark.parametrize("content", [b"", b"\x00\x01 no graph", b"vtrt"])
def test_what_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(InputError, match="not an ONNX file"):
        read_lowered(tmp_path / "m.onnx")


def test_the_waist_s_operators_are_no_plugins() -> None:
    assert not is_plugin("FloatQuantizeOnline_e2m3")
    assert not is_plugin("NoSuchOperator")


def _with_plugin(path: Path) -> LoweredGraph:
    graph = read_lowered(path)
    return LoweredGraph(graph.path, graph.model, graph.lowered_for, graph.layers, ("Scale_k64",))


def test_plugins_need_their_tensorrt(tmp_path: Path) -> None:
    graph = _with_plugin(write_lowered(tmp_path, "orin"))
    with pytest.raises(EnvironmentLacksError, match=r"needs TensorRT 10\.9 or later, not 10\.3.*kernels=native"):
        check_version(graph, (10, 3))
    check_version(graph, (10, 9))
    with pytest.raises(InputError, match=r"TensorRT-RTX \(target rtx-sm89\) takes no plugins"):
        check_kernels(graph, TARGETS["rtx-sm89"])


def test_plugins_need_their_kernels(tmp_path: Path) -> None:
    graph, folder = _with_plugin(write_lowered(tmp_path, "orin")), tmp_path / "lowered.orin.kernels"
    with pytest.raises(InputError, match=r"lowered\.orin\.kernels/kernels\.json: not there; copy the folder"):
        check_kernels(graph, TARGETS["orin"])
    write_library(folder)
    check_kernels(graph, TARGETS["orin"])
    with pytest.raises(InputError, match=r"no kernel of Scale_k64 for compute capability 8\.9 \(there are for: 8\.7\)"):
        check_kernels(graph, TARGETS["l4"])
    (ptx,) = folder.glob("*.ptx")
    ptx.write_text(".version 8.6")
    with pytest.raises(InputError, match=r"\.ptx: damaged"):
        check_kernels(graph, TARGETS["orin"])
