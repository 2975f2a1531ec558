"""Figures of samples: right for known distributions, with intervals as wide as samples vary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tools.quality_cells.figures import (
    Interval,
    Judge,
    bootstrapped,
    decibels_closer,
    distances_apart,
    frechet_distance,
    signal_to_noise_db,
)

CLASSIFIER = Path(__file__).parents[2] / "recipes" / "digits" / "classifier.onnx"


def test_frechet_distances_of_known_distributions() -> None:
    generator = np.random.default_rng(0)
    first = generator.normal(size=(4000, 3))
    first -= first.mean(axis=0)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first + np.array([3.0, 0, 4.0]), first) == pytest.approx(25, rel=1e-6)
    # A feature that never moves, whose covariance has no triangular factor.
    still = np.hstack([first, np.zeros((len(first), 1))])
    assert frechet_distance(3 * still, still) == pytest.approx(frechet_distance(3 * first, first), rel=1e-6)
    # Of N(0, σ²) and N(0, 1) it is (σ - 1)² in every direction.
    assert frechet_distance(3 * first, first) == pytest.approx(4 * np.trace(np.cov(first, rowvar=False)), rel=1e-6)


def test_intervals_are_as_wide_as_samples_vary() -> None:
    hits = np.arange(1000) % 10 != 0
    interval = bootstrapped(lambda chosen: float(hits[chosen].mean()), len(hits))
    assert interval.value == pytest.approx(0.9)
    assert interval.low is not None
    assert interval.high is not None
    error = np.sqrt(0.9 * 0.1 / 1000)
    assert 1.2 * error < interval.value - interval.low < 2.8 * error
    assert 1.2 * error < interval.high - interval.value < 2.8 * error


def test_a_share_s_interval_stays_between_none_and_all() -> None:
    assert Interval(0.99, 0.98, 1.01).within(0.0, 1.0) == Interval(0.99, 0.98, 1.0)
    assert Interval(0.01, -0.01, 0.02).within(0.0, 1.0) == Interval(0.01, 0.0, 0.02)


def test_without_resamples_there_is_no_interval() -> None:
    assert bootstrapped(lambda chosen: float(len(chosen)), 3, resamples=0).within(0.0, 9.0) == Interval(3.0)


def test_distances_vary_with_both_sets() -> None:
    generator = np.random.default_rng(0)
    ours, theirs = generator.normal(size=(2, 400))
    one = bootstrapped(lambda chosen: float(ours[chosen].mean() - theirs.mean()), 400)
    both = bootstrapped(lambda chosen, other: float(ours[chosen].mean() - theirs[other].mean()), 400, sets=2)
    assert both.value == one.value
    assert None not in (one.low, one.high, both.low, both.high)
    assert (both.high - both.low) / (one.high - one.low) == pytest.approx(np.sqrt(2), rel=0.1)


def test_distances_of_the_same_noise_are_told_apart_where_they_differ() -> None:
    generator = np.random.default_rng(0)
    noise, theirs = generator.normal(size=(2, 1000, 3))
    ours = noise + 0.01 * generator.normal(size=noise.shape)
    others = {"alike": noise + 0.01 * generator.normal(size=noise.shape), "off": noise + np.array([1.0, 0.0, 0.0])}
    found = distances_apart(ours, others, theirs, resamples=200)
    for name, interval in found.items():
        other = others[name]
        assert interval.value == pytest.approx(frechet_distance(ours, theirs) - frechet_distance(other, theirs))
    alike, off = found["alike"], found["off"]
    assert None not in (alike.low, alike.high, off.low, off.high)
    assert alike.low < 0 < alike.high < 0.05
    assert -1.5 < off.low < off.high < -0.5


def test_samples_that_are_closer_to_the_originals_of_the_same_noise_are_told_apart() -> None:
    generator = np.random.default_rng(0)
    exact = generator.normal(size=(1000, 3))
    ours, *rest = (exact + error * generator.normal(size=exact.shape) for error in (0.1, 0.1, 0.2, 0.05))
    found = decibels_closer(ours, dict(zip(("alike", "farther", "closer"), rest, strict=True)), exact, resamples=200)
    for name, decibels in (("alike", 0.0), ("farther", 6.02), ("closer", -6.02)):
        low, value, high = found[name].low, found[name].value, found[name].high
        assert low is not None
        assert high is not None
        assert value == pytest.approx(decibels, abs=0.4)
        assert low < value < high
        assert high - low < 1.0
    assert decibels_closer(ours, {"twice": exact + 2 * (ours - exact)}, exact, resamples=2)["twice"].value == (
        pytest.approx(10 * np.log10(4))
    )


def test_drift_is_in_decibels() -> None:
    exact = np.ones((2, 1, 2, 2), np.float32)
    assert signal_to_noise_db(exact, exact * 0.9) == pytest.approx(20, abs=1e-4)


def test_the_judge_sees_classes_and_features_of_the_shipped_classifier() -> None:
    classes, features = Judge(CLASSIFIER).look(np.zeros((300, 1, 8, 8), np.float32))
    assert classes.shape == (300,)
    assert features.shape[0] == 300
    assert features.shape[1] > 10
