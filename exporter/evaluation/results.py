"""results.json for programs, and results.md: our rows beside the published ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.evaluation.metrics import Measured, Metric
from exporter.evaluation.presets import Preset
from exporter.files import write_text_atomically

# Fewer images than this, and FID says more about the number of images than about the images.
_FEWEST_FOR_FID = 2048


@dataclass(frozen=True)
class Results:
    """Every metric of both models; `measured` maps a row's label to metric name → value."""

    preset: Preset
    settings: Mapping[str, Any]
    images: int
    measured: Mapping[str, Mapping[str, Measured]]

    def write(self, folder: Path, metrics: Sequence[Metric]) -> tuple[Path, Path]:
        """Write both files; returns their paths."""
        json_path, text_path = folder / "results.json", folder / "results.md"
        write_text_atomically(json_path, json.dumps(self._facts(), indent=1, allow_nan=False) + "\n")
        write_text_atomically(text_path, self.markdown(metrics))
        return json_path, text_path

    def _facts(self) -> dict[str, Any]:
        rows = {label: {name: _fact(value) for name, value in row.items()} for label, row in self.measured.items()}
        published = [{"label": row.label, **row.values} for row in self.preset.published]
        return {
            "preset": self.preset.name,
            "source": self.preset.source,
            "settings": dict(self.settings),
            "images": self.images,
            "measured": rows,
            "published": published,
            "deviations": list(self.preset.deviations),
        }

    def markdown(self, metrics: Sequence[Metric]) -> str:
        """The table, what was not computed and why, and in what the published rows differ."""
        head = ["", *(f"{metric.label} {'↑' if metric.better == 'higher' else '↓'}" for metric in metrics)]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for row in self.preset.published:
            lines.append(
                _line(f"{row.label} (published)", [_number(row.values.get(metric.name)) for metric in metrics])
            )
        for label, measured in self.measured.items():
            lines.append(_line(f"**{label}**", [_number(_value(measured, metric)) for metric in metrics]))
        return "\n".join([f"# {self._title()}", "", *lines, "", *self._notes(metrics)]).rstrip() + "\n"

    def _title(self) -> str:
        return f"{self.images} images, " + (
            "no preset" if self.preset.name == "none" else f"preset {self.preset.name}: {self.preset.model}"
        )

    def _notes(self, metrics: Sequence[Metric]) -> list[str]:
        drawn = ", ".join(f"{key} {self.settings[key]}" for key in ("scheduler", "steps", "guidance"))
        notes = [f"Drawn with {drawn}. Setup: {self.preset.source}."]
        missing: dict[str, list[str]] = {}
        for metric in metrics:
            for label, measured in self.measured.items():
                value = measured.get(metric.name)
                if value is not None and value.value is None:
                    missing.setdefault(f"{metric.label}: {value.not_computed}", []).append(label)
        if missing:
            notes += ["", "Not computed:", ""]
            notes += [f"- {reason} ({', '.join(labels)})" for reason, labels in missing.items()]
        differences = list(self.preset.deviations)
        fids = [row["fid"].value for row in self.measured.values() if "fid" in row]
        if any(value is not None for value in fids) and self.images < _FEWEST_FOR_FID:
            differences.append(f"FID of {self.images} images depends on their number; published ones have thousands")
        if differences:
            notes += ["", "Differences that the numbers can show:", "", *(f"- {entry}" for entry in differences)]
        return notes


def _value(measured: Mapping[str, Measured], metric: Metric) -> float | None:
    found = measured.get(metric.name)
    return None if found is None else found.value


def _fact(measured: Measured) -> dict[str, Any]:
    return {key: value for key, value in asdict(measured).items() if value != ""}


def _line(label: str, cells: Sequence[str]) -> str:
    return "| " + " | ".join([label, *cells]) + " |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
