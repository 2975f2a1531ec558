"""Figures of samples: recognition, and the Fréchet distance in a classifier's feature space, with bootstraps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx

from exporter.runtime import OnnxSession

Floats = npt.NDArray[np.float64]

RESAMPLES = 1000
FEATURES = "features"
_BATCH = 256
_CONFIDENCE = (2.5, 97.5)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval, if it has been resampled."""

    value: float
    low: float | None = None
    high: float | None = None

    def within(self, least: float, most: float) -> Interval:
        """The same of a figure that cannot be outside: the interval's shift may have led it there."""
        if self.low is None or self.high is None:
            return self
        return replace(self, low=max(self.low, least), high=min(self.high, most))


@dataclass(frozen=True)
class Comparison:
    """One row's samples against other rows', by their keys: its Fréchet distance minus theirs, and by how many dB its
    samples' features are closer to those of the original's samples that began with the same noise."""

    frechet: dict[str, Interval]
    features: dict[str, Interval]


class Judge:
    """The shipped classifier with the tensor in front of its last layer as a second output."""

    def __init__(self, classifier: Path) -> None:
        model = onnx.load(classifier)
        model.graph.output.append(onnx.helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, None))
        self._session = OnnxSession(model)

    def look(self, images: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], Floats]:
        """Images [n, C, H, W] → (classes int64 [n], features [n, F])."""
        classes, features = [], []
        for start in range(0, len(images), _BATCH):
            found = self._session.run({"samples": images[start : start + _BATCH]})
            classes.append(found["logits"].argmax(axis=1))
            features.append(found[FEATURES].astype(np.float64))
        return np.concatenate(classes), np.concatenate(features)


def frechet_distance(ours: Floats, theirs: Floats) -> float:
    """Of the normal distributions with the means and covariances of two sets of features [n, F] (arXiv 1706.08500)."""
    return _distance(_Moments.of(ours), _Moments.of(theirs))


@dataclass(frozen=True)
class _Moments:
    """The mean [F] and covariance [F, F] of a set of features."""

    mean: Floats
    covariance: Floats

    @classmethod
    def of(cls, features: Floats) -> _Moments:
        return cls(features.mean(axis=0), np.cov(features, rowvar=False))


def _distance(first: _Moments, second: _Moments) -> float:
    difference = first.mean - second.mean
    # With A = F·Fᵀ the trace of (A·B)^½ is that of the root of Fᵀ·B·F, which is symmetric.
    factor = _factor(first.covariance)
    cross = np.sqrt(np.linalg.eigvalsh(factor.T @ second.covariance @ factor).clip(min=0)).sum()
    traces = np.trace(first.covariance) + np.trace(second.covariance)
    return float(difference @ difference + traces - 2 * cross)


def _factor(covariance: Floats) -> Floats:
    """F with F·Fᵀ = `covariance`: a triangular one takes a tenth of the time of a root, but not every matrix has it."""
    try:
        return cast(Floats, np.linalg.cholesky(covariance))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return cast(Floats, vectors * np.sqrt(values.clip(min=0)))


def bootstrapped(
    figure: Callable[..., float], count: int, sets: int = 1, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """`figure` of the indices of all `count` samples of each of the sets, with the interval of its values on resamples,
    if there are to be any.

    Where resampling itself shifts the figure, as it does a distance, the interval is moved by that shift.
    """
    generator = np.random.default_rng(seed)
    value = figure(*[np.arange(count)] * sets)
    if not resamples:
        return Interval(value)
    drawn = np.array([figure(*generator.integers(count, size=(sets, count))) for _ in range(resamples)])
    low, high = np.percentile(drawn - drawn.mean(), _CONFIDENCE)
    return Interval(value, value + float(low), value + float(high))


def distances_apart(
    ours: Floats, others: Mapping[str, Floats], theirs: Floats, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """By name, our Fréchet distance to `theirs` [n, F] minus another set's, with the interval of the differences.

    All sets but `theirs` began with the same noise: a resample takes the same samples of each, so that what the noise
    leaves open cancels.
    """
    generator = np.random.default_rng(seed)

    def differences(chosen: npt.NDArray[np.int64], reference: npt.NDArray[np.int64]) -> Floats:
        # The reference is the same for all.
        against = _Moments.of(theirs[reference])
        first, *rest = (_distance(_Moments.of(one[chosen]), against) for one in (ours, *others.values()))
        return first - np.array(rest)

    count = len(ours)
    values = differences(np.arange(count), np.arange(count))
    drawn = np.stack([differences(*generator.integers(count, size=(2, count))) for _ in range(resamples)])
    return _with_intervals(others, values, drawn)


def decibels_closer(
    ours: Floats, others: Mapping[str, Floats], original: Floats, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """By name, by how many dB our features are closer to `original` [n, F] than another set's, with intervals: the
    ratio of the squared distances from sample to sample, which all began with the same noise, added up."""
    generator = np.random.default_rng(seed)
    errors = np.stack([np.square(one - original).sum(axis=1) for one in (ours, *others.values())])

    def gains(chosen: npt.NDArray[np.int64]) -> Floats:
        first, *rest = errors[:, chosen].sum(axis=1)
        return cast(Floats, 10 * np.log10(np.array(rest) / first))

    count = len(ours)
    drawn = np.stack([gains(generator.integers(count, size=count)) for _ in range(resamples)])
    return _with_intervals(others, gains(np.arange(count)), drawn)


def _with_intervals(names: Iterable[str], values: Floats, drawn: Floats) -> dict[str, Interval]:
    """`values` [k] with the intervals of those of resamples, `drawn` [r, k], moved by what resampling shifts them."""
    low, high = values + np.percentile(drawn - drawn.mean(axis=0), _CONFIDENCE, axis=0)
    ends = np.stack([values, low, high], axis=1).tolist()
    return {name: Interval(*three) for name, three in zip(names, ends, strict=True)}


def signal_to_noise_db(original: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    """Power of `original` over that of the difference, in dB."""
    signal = np.square(original, dtype=np.float64).sum()
    noise = np.square(cast(Floats, original - other), dtype=np.float64).sum()
    return float(10 * np.log10(signal / noise))
