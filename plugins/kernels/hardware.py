"""What the kernels must know of a GPU, by compute capability."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

Capability: TypeAlias = tuple[int, int]

MAX_SHARED_BYTES = 48 * 1024
"""Shared memory that a launch may use without opting in, which TensorRT's ahead-of-time plugins cannot."""

WARP_SIZE = 32


class UnknownCapabilityError(ValueError):
    """No kernels are made for GPUs of this compute capability."""


@dataclass(frozen=True)
class Hardware:
    """GPUs of one compute capability.

    `ptx_version` is the PTX ISA that kernels are written in (85 is 8.5): the newest that the oldest driver which they
    must load on takes, CUDA 12.6's for JetPack 6 and CUDA 13.0's for Blackwell. `has_fp8` tells of E4M3: conversion
    instructions and tensor cores (PTX ISA: sm_89 and later).
    """

    capability: Capability
    ptx_version: int
    has_fp8: bool

    @property
    def architecture(self) -> str:
        """The PTX target. From Hopper on it has the architecture's own instructions and runs on no other."""
        major, minor = self.capability
        return f"sm_{major}{minor}{'a' if major >= 9 else ''}"

    @property
    def label(self) -> str:
        """How names of kernels end: ``sm90``."""
        return "sm{}{}".format(*self.capability)


_TABLE = (
    Hardware((8, 0), 85, has_fp8=False),
    Hardware((8, 6), 85, has_fp8=False),
    Hardware((8, 7), 85, has_fp8=False),
    Hardware((8, 9), 85, has_fp8=True),
    Hardware((9, 0), 85, has_fp8=True),
    Hardware((10, 0), 90, has_fp8=True),
    Hardware((11, 0), 90, has_fp8=True),
    Hardware((12, 0), 90, has_fp8=True),
)
HARDWARE: Mapping[Capability, Hardware] = MappingProxyType({entry.capability: entry for entry in _TABLE})
"""Every GPU that kernels are made for."""


def hardware_of(capability: Capability) -> Hardware:
    """The facts of a compute capability. Raises UnknownCapabilityError, which lists the known ones."""
    if capability not in HARDWARE:
        known = ", ".join("{}.{}".format(*entry) for entry in HARDWARE)
        raise UnknownCapabilityError("no kernels for compute capability {}.{}; known: {}".format(*capability, known))
    return HARDWARE[capability]
