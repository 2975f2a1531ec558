"""The prose of docs/quality.md says what the kept cells say."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.progress import NullProgress
from tools.quality_cells.cells import Laboratory
from tools.quality_cells.rows import BITS, INTEGERS, OURS, ROWS, SEEDS, W3A6, W4A4, W4A6, W4A8, Bits, row_of
from tools.quality_cells.verdict import differences, verdict

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "digits.yaml"


@pytest.fixture
def digits(tmp_path: Path) -> Laboratory:
    return Laboratory(RECIPE, tmp_path, ROOT / "docs" / "quality" / "digits", NullProgress())


def gains(digits: Laboratory, key: str, other: str, bits: Bits) -> list[float]:
    """By how much the first row is closer on the mean, seed by seed."""
    rows = [[figures.snr_mean_db for figures in digits.all_kept(row_of(name), bits)] for name in (key, other)]
    assert [len(row) for row in rows] == [len(SEEDS)] * 2
    return [one - another for one, another in zip(*rows, strict=True)]


# What docs/quality.md's prose says of the digits: row, bits, against zero points; of the mean and of the worst step.
SAID = [
    ("ours", W4A6, False, "floats closer", "floats closer"),
    ("ours", W4A4, False, "floats closer", "floats closer"),
    ("ours", W3A6, False, "floats closer", "floats closer"),
    ("ours", W4A6, True, "no difference", "floats closer"),
    ("ours", W4A4, True, "integers closer", "integers closer"),
    ("ours", W4A8, False, "integers closer", "integers closer"),
    ("ours", W4A8, True, "integers closer", "integers closer"),
    ("fp4dit", W4A8, False, "integers closer", "integers closer"),
    ("fp4dit", W4A6, False, "integers closer", "integers closer"),
    ("fp4dit", W4A4, False, "floats closer", "floats closer"),
    ("fp4dit", W3A6, False, "integers closer", "integers closer"),
    ("fp_unsigned", W4A6, True, "floats closer", "floats closer"),
    ("fp_unsigned", W4A4, True, "floats closer", "floats closer"),
    ("mixed", W4A8, True, "floats closer", "floats closer"),
]


@pytest.mark.parametrize(("key", "bits", "zero_points", "mean", "worst"), SAID)
def test_the_prose_says_what_the_kept_cells_say(
    key: str, bits: Bits, zero_points: bool, mean: str, worst: str, digits: Laboratory
) -> None:
    found = differences(digits, key, bits, zero_points=zero_points)
    assert [verdict(each) for each in found] == [mean, worst]


CLOSER = [
    *(("fp4dit", row.key, W4A4) for row in INTEGERS if not row.zero_points),
    *(("int_absmax", "fp4dit", bits) for bits in (W4A8, W4A6)),
    *(("fp4dit", "int_absmax", bits) for bits in (W4A4, W3A6)),
    *((row.key, "fp4dit_loop", W4A8) for row in INTEGERS),
    *(("fp4dit_loop", key, W4A6) for key in ("int_nearest", "int_adaround", "int_gptq")),
    *((key, "fp4dit_loop", W4A6) for key in ("int_ours", "int_adaround_zero", "int_gptq_zero", "int_ours_zero")),
    *(("fp4dit_published", row.key, W4A6) for row in INTEGERS if not row.zero_points),
    ("int_ours_zero", "fp4dit_published", W4A6),
    *(("fp4dit_loop", row.key, W4A4) for row in INTEGERS if not row.zero_points),
    ("int_ours_zero", "fp4dit_loop", W4A4),
    ("int_adaround", "fp_adaround", W4A8),
    *(("fp_adaround", "int_adaround", bits) for bits in (W4A6, W4A4, W3A6)),
    *(("fp_gptq", "int_gptq", bits) for bits in (W4A6, W4A4, W3A6)),
    ("int_nearest", "fp_nearest", W3A6),
    ("fp_joint", "ours", W4A4),
    ("ours", "fp_joint", W4A6),
]
"""What the prose says of two rows: the first is closer on the mean with every seed."""


@pytest.mark.parametrize(("key", "other", "bits"), CLOSER)
def test_of_two_rows_the_one_that_the_prose_names_is_closer(
    key: str, other: str, bits: Bits, digits: Laboratory
) -> None:
    assert min(gains(digits, key, other, bits)) > 0


@pytest.mark.parametrize(
    ("key", "other", "bits", "least", "most"),
    [
        *(("fp4dit_firm", "fp4dit", bits, 1.3, 2.7) for bits in (W4A8, W4A6)),
        *(("fp4dit_firm", "fp4dit_loop", bits, -0.8, 0.8) for bits in (W4A8, W4A6)),
        *(("int_firm", "int_adaround", bits, 0.05, 0.7) for bits in (W4A8, W4A6)),
        *(("fp_firm", "fp_adaround", bits, 0.25, 0.8) for bits in (W4A8, W4A6)),
        ("fp_joint", "ours", W4A4, 0.55, 0.9),
        ("fp_joint", "ours", W4A6, -0.4, -0.15),
        ("fp_best", "ours", W4A6, 0.0, 0.15),
        ("int_best", "int_ours", W4A6, 0.0, 0.2),
        ("int_long", "int_firm", W4A6, 0.35, 0.55),
        ("fp_e1m2", "ours", W4A6, -0.4, -0.25),
        ("fp4dit_published", "int_best", W4A6, 0.3, 0.7),
        ("fp4dit_published", "int_long", W4A6, 2.4, 2.85),
    ],
)
def test_gains_are_those_that_the_prose_names(
    key: str, other: str, bits: Bits, least: float, most: float, digits: Laboratory
) -> None:
    found = gains(digits, key, other, bits)
    assert least < min(found)
    assert max(found) < most


@pytest.mark.parametrize("bits", BITS, ids=lambda bits: bits.name)
def test_bf16_costs_no_more_than_docs_scaling_says(bits: Bits, digits: Laboratory) -> None:
    in_bf16, in_fp32 = (digits.all_kept(row_of(key), bits) for key in ("fp_bf16", "ours"))
    assert len(in_bf16) == len(in_fp32) == len(SEEDS)
    for one, other in zip(in_bf16, in_fp32, strict=True):
        assert abs(one.snr_mean_db - other.snr_mean_db) < 0.115
        assert abs(one.snr_worst_db - other.snr_worst_db) < 0.4


@pytest.mark.parametrize(
    ("key", "zero_points", "said"),
    [("ours", False, "floats closer"), ("ours", True, "no difference"), ("fp_unsigned", True, "floats closer")],
)
def test_the_prose_says_what_the_second_model_s_cells_say(
    key: str, zero_points: bool, said: str, tmp_path: Path
) -> None:
    shapes = ROOT / "build" / "shapes" / "shapes.yaml"
    laboratory = Laboratory(shapes, tmp_path, ROOT / "docs" / "quality" / "shapes", NullProgress())
    mean, _ = differences(laboratory, key, W4A6, zero_points=zero_points)
    assert verdict(mean) == said


def test_the_samples_say_no_more_than_the_prose(digits: Laboratory) -> None:
    original = digits.original_judged(0)
    assert original is not None
    cells = [(row, bits) for bits in BITS for row in ROWS]
    judged = [(*cell, figures) for cell in cells for figures in digits.all_kept(*cell) if figures.samples]
    assert len(judged) >= 100
    outside = []
    assert original[1].low is not None
    assert original[1].high is not None
    for row, bits, figures in judged:
        assert figures.drawn
        assert figures.recognised is not None
        assert figures.frechet is not None
        # One sample fewer, at most.
        assert figures.recognised.value > original[0].value - 1.5 / figures.samples
        if not original[1].low < figures.frechet.value < original[1].high:
            outside.append((row.key, bits))
    assert outside == [("int_adaround", W4A4)]


@pytest.mark.parametrize(("seed", "bits"), [*((seed, W4A6) for seed in SEEDS), *((seed, W4A8) for seed in SEEDS[1:])])
def test_of_six_and_eight_bits_sets_of_samples_leave_it_open(seed: int, bits: Bits, digits: Laboratory) -> None:
    found = digits.compared(OURS, INTEGERS, bits, seed, 0).frechet
    assert found.keys() == {row.key for row in INTEGERS}
    for interval in found.values():
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < 0 < interval.high


@pytest.mark.parametrize("seed", SEEDS[1:])
def test_at_four_bits_samples_of_ours_are_closer_than_those_of_integers_around_zero(
    seed: int, digits: Laboratory
) -> None:
    found = digits.compared(OURS, INTEGERS, W4A4, seed, 0).frechet
    for row in INTEGERS:
        low, high = found[row.key].low, found[row.key].high
        assert low is not None
        assert high is not None
        assert (high < 0) == (not row.zero_points)
        assert (low > 0) == (row.key == "int_ours_zero" and seed == SEEDS[2])


_AGAIN = ("int_adaround", "int_gptq")


def test_drawn_once_more_the_sign_of_one_difference_is_the_same_and_of_another_is_not(digits: Laboratory) -> None:
    again = [digits.compared(OURS, INTEGERS, W4A6, seed, 0).frechet for seed in SEEDS]
    first = {key: [figures.frechet for figures in digits.all_kept(row_of(key), W4A6)] for key in ("ours", *_AGAIN)}
    least, most = {}, {}
    for key in _AGAIN:
        differences = [one.value - two.value for one, two in zip(first["ours"], first[key], strict=True) if one and two]
        differences += [found[key].value for found in again]
        assert len(differences) == 2 * len(SEEDS)
        least[key], most[key] = min(differences), max(differences)
    assert 0.25 < least["int_adaround"] < most["int_adaround"] < 0.9
    assert least["int_gptq"] < 0 < most["int_gptq"]


_GPTQ = ("int_gptq", "int_gptq_zero")
# By how many dB features of ours are closer than those of rows of integers: the rows, seeds, the least and the most.
FEATURES = [
    (W4A6, [row.key for row in INTEGERS if not row.zero_points], SEEDS, 2.6, 7.2),
    (W4A6, [row.key for row in INTEGERS if row.zero_points], SEEDS, 0.3, 6.4),
    (W3A6, [row.key for row in INTEGERS if not row.zero_points], SEEDS[2:], 1.9, 9.0),
    (W3A6, [row.key for row in INTEGERS if row.zero_points], SEEDS[2:], 1.1, 8.9),
    (W4A4, [row.key for row in INTEGERS if not row.zero_points], SEEDS[1:], 3.4, 4.96),
    (W4A4, ["int_nearest_zero", "int_adaround_zero", "int_gptq_zero"], SEEDS[1:], 0.45, 1.0),
    (W4A4, ["int_ours_zero"], SEEDS[1:], -1.4, -1.2),
    (W4A8, ["int_ours", "int_ours_zero"], SEEDS[1:], -2.7, -2.15),
    (W4A8, ["int_nearest", "int_adaround", "int_nearest_zero", "int_adaround_zero"], SEEDS[1:], 1.8, 6.2),
    (W4A8, _GPTQ, SEEDS[2:], 0.8, 1.1),
]


@pytest.mark.parametrize(("bits", "keys", "seeds", "least", "most"), FEATURES)
def test_sample_by_sample_ours_is_closer_by_what_the_prose_says(
    bits: Bits, keys: list[str], seeds: tuple[int, ...], least: float, most: float, digits: Laboratory
) -> None:
    for seed in seeds:
        found = digits.compared(OURS, INTEGERS, bits, seed, 0).features
        for interval in (found[key] for key in keys):
            assert interval.low is not None
            assert interval.high is not None
            assert interval.low > 0 or interval.high < 0
            assert least < interval.value < most


def test_by_gptq_integers_at_w4a8_are_not_farther_with_the_other_seed(digits: Laboratory) -> None:
    found = digits.compared(OURS, INTEGERS, W4A8, SEEDS[1], 0).features
    assert all(found[key].value < 0 for key in _GPTQ)
