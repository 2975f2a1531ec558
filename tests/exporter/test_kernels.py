"""Kernels beside a lowered graph: compiled once, again where something changed; and what keeps them from it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from exporter import kernels
from exporter.errors import EnvironmentLacksError
from exporter.kernels import kernel_operators, obtain_kernels
from exporter.progress import NullProgress
from exporter.targets import TARGETS
from exporter.workdir import WorkDir
from plugins.kernels.compile import CompileError, CompilerMissingError
from plugins.kernels.library import KernelLibrary
from tests.exporter.passes.plugins.plugin_graphs import PluginGraph, lowered
from tests.exporter.passes.waist_graphs import make_weight

ORIN = TARGETS["orin"].with_kernels("plugin")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A lowered graph, cut behind its quantizer, whose kernels take a second."""
    waist = PluginGraph()
    model = lowered(waist.model(waist.linear("x", make_weight("fc"))))
    quantizer = model.graph.node[0]
    del model.graph.node[1:], model.graph.output[:]
    model.graph.output.extend(value for value in model.graph.value_info if value.name in quantizer.output)
    path = tmp_path / "lowered.orin.onnx"
    onnx.save(model, path)
    return path


def test_they_are_compiled_once(graph: Path) -> None:
    work = WorkDir.open(graph.parent)
    folder, reused = obtain_kernels(graph, ORIN, work, NullProgress())
    assert (folder.name, reused) == ("lowered.orin.kernels", False)
    library = KernelLibrary.load(folder)
    assert {kernel.op_type for kernel in library.kernels} == set(kernel_operators(graph))
    assert obtain_kernels(graph, ORIN, work, NullProgress()) == (folder, True)

    (first, *_) = folder.glob("*.ptx")
    first.write_text(first.read_text() + "\n")
    assert obtain_kernels(graph, ORIN, work, NullProgress()) == (folder, False)
    assert KernelLibrary.load(folder) == library
    assert not obtain_kernels(graph, ORIN, WorkDir.open(graph.parent, fresh=True), NullProgress())[1]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CompilerMissingError("Triton is not installed; pip install 'fp4export[kernels]'"), "fp4export.kernels"),
        (
            CompileError("TokenQuantize_t0 for sm_87 does not compile: why"),
            r"does not compile: why; the Triton here is \d",
        ),
    ],
)
def test_what_keeps_them_from_being_compiled(
    graph: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(kernels, "compile_library", refuse)
    with pytest.raises(EnvironmentLacksError, match=message):
        obtain_kernels(graph, ORIN, WorkDir.open(graph.parent), NullProgress())
    assert not (graph.parent / "lowered.orin.kernels").exists()
