"""safetensors files are whole or absent, too."""

import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from exporter.errors import InputError
from exporter.tensor_files import atomic_tensor_path


def test_safetensors_that_do_not_fit_name_the_final_path(tmp_path: Path) -> None:
    final = tmp_path / "big.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match=r"big\.safetensors: cannot be written"), atomic_tensor_path(final) as path:
            save_file({"x": np.zeros(10_000, np.float32)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert list(tmp_path.iterdir()) == []
