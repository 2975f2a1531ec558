"""The kernel of error feedback, in Triton's interpreter: bit for bit what PyTorch's operations give."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from exporter.calibration.gptq import ErrorFeedback, round_columns
from exporter.calibration.scales import choose_scales
from exporter.quantize import expand_scales
from plugins.formats import get_format

ROWS, COUNT, GROUP = 11, 24, 8
FORMATS = ("e2m1", "e3m0", "e2m0", "int4")


def compare() -> None:
    """Run by a process that Triton was imported into as an interpreter, which is decided once."""
    from exporter.cuda import error_feedback

    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, COUNT, generator=generator) for size in (ROWS, 200))
    feedback = ErrorFeedback.of((x + x.roll(1, 1)).T @ (x + x.roll(1, 1)))
    for name in FORMATS:
        fmt = get_format(name)
        scales = expand_scales(choose_scales(weight, fmt, GROUP, "absmax") * 0.9, COUNT).double()
        for count in (COUNT, 1):
            part = slice(0, count)
            arguments = weight.double()[:, part], scales[:, part], feedback.factor[part, part], fmt
            found = error_feedback.round_columns(*arguments)
            expected = round_columns(arguments[0].clone(), *arguments[1:])
            for one, other in zip(expected, found, strict=True):
                assert one.numpy().tobytes() == other.numpy().tobytes(), (name, count)
        sys.stdout.write(f"{name}\n")


def test_the_kernel_rounds_as_pytorch_does() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import compare; compare()"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == list(FORMATS)
