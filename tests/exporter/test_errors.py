"""Exit codes and suggestions."""

import pytest

from exporter.errors import (
    EnvironmentLacksError,
    FidelityError,
    Fp4ExportError,
    InputError,
    did_you_mean,
    nearest,
)


@pytest.mark.parametrize(
    ("kind", "code"), [(InputError, 2), (EnvironmentLacksError, 3), (FidelityError, 4), (Fp4ExportError, 2)]
)
def test_every_error_has_its_exit_code(kind: type[Fp4ExportError], code: int) -> None:
    assert kind("message").exit_code == code
    assert issubclass(kind, Fp4ExportError)


def test_ties_go_to_the_same_prefix_and_the_nearest_character() -> None:
    assert nearest("e2m4", ["e3m4", "e2m1", "e2m3"]) == "e2m3"
    assert nearest("stepz", ["samples", "steps", "seed"]) == "steps"


def test_a_beginning_suggests_the_whole_word() -> None:
    assert nearest("DDIM", ["DPMSolverMultistepScheduler", "DDIMScheduler"]) == "DDIMScheduler"
    assert nearest("d", ["digits"]) is None


def test_a_suggestion_when_something_is_alike_else_the_choices() -> None:
    assert did_you_mean("W4A6", ["w4a6", "w4a8"]) == "; did you mean 'w4a6'?"
    assert did_you_mean("zzz", ["w4a6", "w4a8"]) == "; valid: w4a6, w4a8"
    assert did_you_mean("zzz", []) == ""


def test_a_long_list_of_choices_is_cut_and_counted() -> None:
    hint = did_you_mean("zzz", [f"layer{index}" for index in range(300)])
    assert len(hint) < 200
    assert hint.endswith("(300 in all)")
