"""What the absent TensorRT core would do, as far as the builder's code asks for it: records what it is told."""

from __future__ import annotations

from enum import IntEnum
from types import SimpleNamespace
from typing import Any


class Flags10(IntEnum):
    """TensorRT 10's: typing is a choice."""

    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1
    PREFER_AOT_PYTHON_PLUGINS = 2


class Flags12(IntEnum):
    """A release in which everything is strongly typed and the flag is gone."""

    PREFER_AOT_PYTHON_PLUGINS = 2


class Config(SimpleNamespace):
    def __init__(self, gpu: bytes) -> None:
        super().__init__(gpu=gpu, limits={}, profiles=[], cache=None)

    def create_timing_cache(self, content: bytes) -> bytes:
        return content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        if not ignore_mismatch and cache and not cache.startswith(self.gpu):
            return False
        self.cache = cache or self.gpu
        return True

    def get_timing_cache(self) -> SimpleNamespace:
        return SimpleNamespace(serialize=lambda: self.cache + b"+")

    def set_memory_pool_limit(self, pool: str, count: int) -> None:
        self.limits[pool] = count

    def add_optimization_profile(self, profile: Any) -> None:
        self.profiles.append(profile.shapes)


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, *shapes: Any) -> None:
        self.shapes[name] = shapes


class Logger:
    WARNING = 2

    def __init__(self, _severity: int) -> None:
        pass


def builder_class(told: SimpleNamespace, engine: bytes | None) -> type:
    class Builder:
        def __init__(self, _logger: object) -> None:
            pass

        def create_network(self, network_flags: int) -> str:
            told.flags = network_flags
            return "network"

        def create_builder_config(self) -> Config:
            config: Config = told.config
            return config

        def create_optimization_profile(self) -> Profile:
            return Profile()

        def build_serialized_network(self, _network: str, config: Config) -> bytes | None:
            config.progress_monitor.phase_start("Building", None, 2)
            config.progress_monitor.step_complete("Building", 0)
            config.progress_monitor.phase_finish("Building")
            return engine

    return Builder


def parser_class(told: SimpleNamespace) -> type:
    class Parser:
        num_errors = 1

        def __init__(self, _network: str, _logger: object) -> None:
            pass

        def parse_from_file(self, path: str) -> bool:
            told.parsed = path
            return "refused" not in path

        def get_error(self, _index: int) -> SimpleNamespace:
            facts = {"node": 7, "desc": "no importer", "node_name": "late", "node_operator": "Swish"}
            return SimpleNamespace(**{name: lambda fact=fact: fact for name, fact in facts.items()})

    return Parser


def fake_tensorrt(flags: type[IntEnum] = Flags10, gpu: bytes = b"gpu", engine: bytes | None = b"engine") -> Any:
    """A module of the name; what it was told is in its `told`."""
    told = SimpleNamespace(config=Config(gpu), flags=None, parsed=None)
    return SimpleNamespace(
        told=told,
        Builder=builder_class(told, engine),
        OnnxParser=parser_class(told),
        Logger=Logger,
        IProgressMonitor=type("IProgressMonitor", (), {}),
        NetworkDefinitionCreationFlag=SimpleNamespace(**flags.__members__),
        ProfilingVerbosity=SimpleNamespace(DETAILED="detailed"),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
    )
