"""The process that runs Triton's compiler: kernels' descriptions in, PTX out, one JSON document a line each.

It is a process of its own because LLVM ends the process over an unfit PTX version, and because kernels that were
imported for Triton's interpreter cannot be compiled. Started by `plugins.kernels.compile`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from typing import Any

POINTER_ALIGNMENT = 16
"""Bytes that every tensor's address is a multiple of, so that loads of 16 bytes are legal. TensorRT asks for 256."""


def compile_ptx(request: dict[str, Any]) -> dict[str, Any]:
    """PTX and metadata of one kernel, in the words of `plugins.kernels.compile`."""
    from triton import compile as compile_triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    module, _, name = request["source"].partition(":")
    function = getattr(importlib.import_module(module), name)
    arguments, constants = request["arguments"], request["constants"]
    names = function.arg_names
    free = [name for name in names if name not in constants]
    if len(free) != len(arguments) or not set(constants) <= set(names):
        raise TypeError(
            f"{request['source']} has the parameters {', '.join(names)}: "
            f"not {len(arguments)} arguments beside {', '.join(constants)}"
        )
    types = dict(zip(free, arguments, strict=True))
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (names.index(name),): [["tt.divisibility", POINTER_ALIGNMENT]]
        for name, element in types.items()
        if element.startswith("*")
    }
    source = ASTSource(function, signature, {(names.index(key),): value for key, value in constants.items()}, aligned)
    compute_capability = request["compute_capability"]
    kernel = compile_triton(source, GPUTarget("cuda", compute_capability, 32), request["options"])
    metadata = kernel.metadata
    return {
        "ptx": kernel.asm["ptx"],
        "shared_bytes": metadata.shared,
        "scratch_bytes": metadata.global_scratch_size + metadata.profile_scratch_size,
        "descriptors": len(metadata.tensordesc_meta or ()),
        "clusters": metadata.num_ctas,
        "compiler": f"Triton {metadata.triton_version}",
        "ptxas": get_ptxas(compute_capability).path,
    }


def main() -> None:
    """Answer the requests on standard input in turn; whatever libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    for line in sys.stdin:
        answers.write(json.dumps(compile_ptx(json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
