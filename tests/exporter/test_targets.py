"""Targets: names, suffixes, and what `auto` means where."""

import pytest

from exporter import targets
from exporter.errors import InputError
from exporter.gpu import Gpu
from exporter.targets import AUTO, DEFAULT_RTX, TARGETS, get_target, resolve_target


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch):
    """Pretend that this machine's GPU is the given one."""

    def pretend(gpu: Gpu | None) -> None:
        monkeypatch.setattr(targets, "local_gpu", lambda: gpu)

    return pretend


def test_an_unknown_target_suggests_one() -> None:
    with pytest.raises(InputError, match="unknown target 'rtx-sm88'; did you mean 'rtx-sm89'"):
        get_target("rtx-sm88")


@pytest.mark.parametrize("name", TARGETS)
def test_plugins_are_for_tensorrt(name: str) -> None:
    target = TARGETS[name]
    assert target.with_kernels("native") is target
    if target.engine == "tensorrt":
        plugin = target.with_kernels("plugin")
        assert (plugin.kernels, plugin.containers) == ("plugin", target.plugin_containers)
        assert plugin.with_kernels("plugin") is plugin
        assert plugin.with_kernels("native") == target
    else:
        with pytest.raises(InputError, match=f"target {name} takes `kernels: native` only.*orin, l4, h100"):
            target.with_kernels("plugin")


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_takes_its_own_suffixes_and_refuses_the_others(name: str) -> None:
    for suffix in (".onnx", ".plan", ".engine"):
        if suffix in TARGETS[name].suffixes:
            assert resolve_target(name, f"out{suffix}").target.name == name
        else:
            with pytest.raises(InputError, match=f"target {name} is written as"):
                resolve_target(name, f"out{suffix}")


@pytest.mark.parametrize("output", ["out.trt", "out", "out.onnx.gz", ".plan"])
def test_an_unknown_suffix_lists_the_known(output: str) -> None:
    with pytest.raises(InputError, match=r"\.onnx .*\.plan or \.engine"):
        resolve_target(AUTO, output)


def test_auto_is_the_cpu_for_onnx(here) -> None:
    here(Gpu("NVIDIA H200", (9, 0)))
    choice = resolve_target(AUTO, "out.onnx")
    assert choice.target.name == "cpu"
    assert "ONNX Runtime" in choice.reason


@pytest.mark.parametrize(
    ("gpu", "name", "said"),
    [
        (None, DEFAULT_RTX, "no GPU here"),
        (Gpu("NVIDIA GeForce RTX 3090", (8, 6)), "rtx-sm86", "RTX 3090"),
        (Gpu("NVIDIA L4", (8, 9)), "rtx-sm89", "NVIDIA L4"),
        (Gpu("NVIDIA H200", (9, 0)), "h100", "9.0"),
        (Gpu("Orin", (8, 7)), "orin", "Orin"),
        (Gpu("Tesla V100", (7, 0)), DEFAULT_RTX, "no target fits the Tesla V100"),
    ],
)
@pytest.mark.parametrize("suffix", [".plan", ".engine"])
def test_auto_is_the_gpu_here_or_the_default(here, gpu: Gpu | None, name: str, said: str, suffix: str) -> None:
    here(gpu)
    choice = resolve_target(AUTO, f"out{suffix}")
    assert choice.target.name == name
    assert said in choice.reason
