"""Launches compiled kernels through the CUDA driver, on GPUs without TensorRT: the very PTX, with the very parameters.

Needs libcuda, which comes with NVIDIA's driver, and nothing else. Tests run it against a stand-in that
records its calls.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plugins.kernels.hardware import WARP_SIZE, Capability
from plugins.kernels.library import LibraryKernel

_LOG_BYTES = 16384
_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES = 5, 6
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


class DriverMissingError(RuntimeError):
    """There is no CUDA driver, or no GPU, on this machine."""


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


class Driver:
    """The primary context of one GPU. Use it as a context manager: leaving it unloads kernels and lets go of the GPU.

    Raises:
        DriverMissingError: no libcuda, or no such GPU.
    """

    def __init__(self, device: int = 0, library: str = "libcuda.so.1") -> None:
        try:
            self._cuda = ctypes.CDLL(library)
        except OSError as error:
            raise DriverMissingError(
                f"{library} cannot be loaded ({error}): kernels run on machines with an NVIDIA GPU and its driver"
            ) from error
        self._modules: list[ctypes.c_void_p] = []
        handle = ctypes.c_int()
        try:
            self._call("cuInit", 0)
            self._call("cuDeviceGet", ctypes.byref(handle), device)
        except DriverError as error:
            raise DriverMissingError(f"GPU {device} is not there: {error}") from error
        self._device = handle
        self.capability: Capability = (self._attribute(_CAPABILITY_MAJOR), self._attribute(_CAPABILITY_MINOR))
        context = ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
        self._call("cuCtxSetCurrent", context)

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *exception: object) -> None:
        for module in self._modules:
            self._call("cuModuleUnload", module)
        self._modules.clear()
        self._call("cuDevicePrimaryCtxRelease_v2", self._device)

    def load(self, kernel: LibraryKernel) -> LoadedKernel:
        """Compile the PTX for this GPU. Raises DriverError with the compiler's words, also for another GPU's PTX."""
        if kernel.capability != self.capability:
            made, here = ("{}.{}".format(*capability) for capability in (kernel.capability, self.capability))
            raise DriverError(f"{kernel.entry} is made for compute capability {made}, and this GPU has {here}")
        log = ctypes.create_string_buffer(_LOG_BYTES)
        options = (ctypes.c_int * 2)(_JIT_ERROR_LOG, _JIT_ERROR_LOG_BYTES)
        values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self._call(
                "cuModuleLoadDataEx", ctypes.byref(module), ctypes.c_char_p(kernel.ptx.encode()), 2, options, values
            )
        except DriverError as error:
            raise DriverError(f"{kernel.entry}: {error}: {log.value.decode(errors='replace').strip()}") from error
        self._modules.append(module)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(kernel.entry.encode()))
        return LoadedKernel(self, kernel, function)

    def synchronize(self) -> None:
        """Wait for everything that was launched."""
        self._call("cuCtxSynchronize")

    def milliseconds(self, launch: Callable[[], None], stream: int = 0) -> float:
        """Time that what `launch` puts on the stream takes, by events."""
        start, end = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (start, end):
            self._call("cuEventCreate", ctypes.byref(event), 0)
        try:
            self._call("cuEventRecord", start, ctypes.c_void_p(stream))
            launch()
            self._call("cuEventRecord", end, ctypes.c_void_p(stream))
            self._call("cuEventSynchronize", end)
            elapsed = ctypes.c_float()
            self._call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        finally:
            for event in (start, end):
                self._call("cuEventDestroy_v2", event)
        return elapsed.value

    def _attribute(self, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self._device)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._cuda, name)(*arguments)
        if status:
            text = ctypes.c_char_p()
            self._cuda.cuGetErrorString(status, ctypes.byref(text))
            words = (text.value or b"unknown error").decode()
            raise DriverError(f"{name} failed: {words} ({status})")


class LoadedKernel:
    """A kernel on a GPU."""

    def __init__(self, driver: Driver, kernel: LibraryKernel, function: ctypes.c_void_p) -> None:
        self._driver, self.kernel, self._function = driver, kernel, function

    def launch(
        self, inputs: Sequence[int], scalars: Mapping[str, int], outputs: Sequence[int], stream: int = 0
    ) -> None:
        """Put the kernel on a stream, with device addresses in the kernel's order and its scalars by name.

        `scalars` always has ``rows``, on which the grid depends. Raises DriverError for a wrong count of addresses, or
        a scalar that is missing.
        """
        kernel = self.kernel
        if (len(inputs), len(outputs)) != (len(kernel.inputs), len(kernel.outputs)):
            wanted = f"{len(kernel.inputs)} inputs and {len(kernel.outputs)} outputs"
            raise DriverError(f"{kernel.entry} takes {wanted}, not {len(inputs)} and {len(outputs)}")
        missing = sorted({"rows", *kernel.scalars} - set(scalars))
        if missing:
            raise DriverError(f"{kernel.entry} needs the scalar {missing[0]}")
        arguments: list[Any] = [
            *(ctypes.c_void_p(address) for address in inputs),
            *(ctypes.c_int32(scalars[name]) for name in kernel.scalars),
            *(ctypes.c_void_p(address) for address in outputs),
        ]
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        grid = (kernel.launch.programs(scalars["rows"]), 1, 1)
        block = (kernel.launch.num_warps * WARP_SIZE, 1, 1)
        self._driver._call(
            "cuLaunchKernel",
            self._function,
            *grid,
            *block,
            kernel.shared_bytes,
            ctypes.c_void_p(stream),
            pointers,
            None,
        )
