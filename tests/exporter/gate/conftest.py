"""The hand-made example, built once."""

from __future__ import annotations

import pytest

from tests.exporter.gate.hand_made import Example, build_example


@pytest.fixture(scope="session")
def example() -> Example:
    return build_example()
