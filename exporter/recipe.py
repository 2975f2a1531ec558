"""Recipes: one flat YAML file that says what to export and how, checked before any work starts.

`load_recipe` is the way in. Every section is a frozen pydantic model; unknown keys are errors, and each error is one
line with the file, the key and the nearest valid value.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from exporter.compute import Compute
from exporter.errors import InputError
from exporter.evaluation_section import EvaluationSection
from exporter.explain import explain
from exporter.layer_section import ContainerChoice, LayerRule, known
from exporter.method_section import MethodSection, default_where_open
from exporter.model_section import LABELLED_FAMILIES, UNBALANCED_FAMILIES, Count, ModelSection, Section, Seed, Text
from exporter.recipe_file import Override, apply_overrides, find_recipe, parse_override, read_mapping
from exporter.targets import AUTO, TARGETS, Kernels
from exporter.yaml_text import dump_yaml

Preset = Literal["w4a6", "w4a8", "w4a8_int", "w8a8", "w4a16", "nvfp4", "mxfp8"]
StorageChoice = Literal["auto", "packed", "container"]
Scheduler = Literal[
    "DPMSolverMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "UniPCMultistepScheduler",
]
PRESETS: tuple[str, ...] = get_args(Preset)
SCHEDULERS: tuple[str, ...] = get_args(Scheduler)

_PATHS = (("model", "weights"), ("calibration", "prompts"), ("evaluation", "classifier"))
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")


def _target(name: str) -> str:
    return known(name, "target", (AUTO, *TARGETS))


def _device(name: str) -> str:
    if _DEVICE.fullmatch(name) is None:
        raise ValueError(f"unknown device {name!r}; known: auto, cpu, cuda, cuda:N")
    return name


class CalibrationSection(Section):
    """How the sampler runs whose transformer inputs calibrate the rounding."""

    prompts: Text | None = Field(default=None, description="the safetensors file with the prompt embeddings")
    classes: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1)] | None = Field(
        default=None, description="class labels to draw, in families that take labels; unset: spread over all classes"
    )
    scheduler: Scheduler = "DPMSolverMultistepScheduler"
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance: Annotated[float, Field(ge=0)] = 4.5
    samples: Count = Field(default=16, description="how many sampling trajectories are captured")
    every: Count = Field(
        default=1, description="of every trajectory each so many-th step is captured, counted back from the last"
    )
    seed: Seed = 0
    memory: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="GB for all samples' activations, which are files beyond that unless a GPU keeps them, and before "
        "them for Gram matrices, which are made in parts beyond that; unset: half of what is free",
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto", description="what calibrates: cpu, cuda, cuda:N, or auto: a GPU if PyTorch sees one"
    )
    device_memory: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="GB of the GPU's memory that calibration may use, half of it at most for all samples' activations; "
        "unset: what is free",
    )

    @model_validator(mode="after")
    def _every_is_within_steps(self) -> CalibrationSection:
        if self.every > self.steps:
            raise ValueError(f"every {self.every} is above steps {self.steps}")
        return self

    @property
    def kept_steps(self) -> range:
        """The steps, counted from 0, whose inputs are captured: the last one, and each `every`-th before it."""
        return range((self.steps - 1) % self.every, self.steps, self.every)

    @property
    def whole(self) -> CalibrationSection:
        """The same with every step captured: as trajectories are that judge what was calibrated."""
        return self.model_copy(update={"every": 1})

    @property
    def inputs(self) -> int:
        """How many inputs are captured: of every kept step of every trajectory one, with guidance two."""
        return self.samples * len(self.kept_steps) * (1 if self.guidance == 1.0 else 2)

    @property
    def sampler(self) -> dict[str, Any]:
        """What a captured trajectory depends on beside its prompt, its seed and the kind of device."""
        return self._facts({"samples", "seed"})

    @property
    def captured(self) -> dict[str, Any]:
        """What the captured inputs depend on, beside the model, its prompts and the kind of device."""
        return self._facts(set())

    def _facts(self, left_out: set[str]) -> dict[str, Any]:
        """All that decides captured inputs but what is `left_out`; `every` only where it leaves steps out, so that what
        was measured before there was such a key keeps its name."""
        unthinned = {"every"} if self.every == 1 else set[str]()
        return self.model_dump(exclude={"prompts", "memory", "device", "device_memory"} | unthinned | left_out)


class Recipe(Section):
    """A whole recipe; `source_dir` is the folder that its relative paths start from."""

    model: ModelSection
    target: Annotated[str, AfterValidator(_target)] = AUTO
    compute: Compute = Field(
        default="fp32", description="what a TensorRT engine computes in outside its quantized linears"
    )
    kernels: Kernels = Field(
        default="native",
        description="what runs quantized linears in a TensorRT engine: its own kernels, or plugins with packed weights",
    )
    preset: Preset | None = None
    storage: StorageChoice = Field(
        default="auto",
        description="how the output holds weights of 4 bits: packed, or as their container, in twice the space; "
        "auto: packed in a .onnx, else the container; plugins have packed ones always",
    )
    container: ContainerChoice = Field(
        default="auto",
        description="number type that quantized layers are multiplied in; auto: the target's best",
    )
    calibration: CalibrationSection = CalibrationSection()
    # Validated, so that no section means what an empty one does.
    method: MethodSection = Field(default=MethodSection(), validate_default=True)
    layers: Annotated[tuple[LayerRule, ...], Field(strict=False)] = ()
    evaluation: EvaluationSection = EvaluationSection()

    _source_dir: Path = PrivateAttr(default_factory=Path.cwd)
    _name: str = PrivateAttr(default="recipe")

    @property
    def source_dir(self) -> Path:
        """The folder of the recipe's file; the current folder for a recipe made in Python."""
        return self._source_dir

    @property
    def name(self) -> str:
        """The recipe as messages call it: its file's path."""
        return self._name

    def resolve_path(self, path: str) -> Path:
        """A path of the recipe (relative to its folder, or absolute, or with ~) as an absolute one."""
        return Path(os.path.normpath(self._source_dir / Path(path).expanduser()))

    @field_validator("method", mode="before")
    @classmethod
    def _rounds_as_well_as_it_can(cls, given: Any, info: ValidationInfo) -> Any:
        # Nothing where the model is itself wrong, which is then the error.
        model: ModelSection | None = info.data.get("model")
        return default_where_open(given, balances=model is not None and model.family not in UNBALANCED_FAMILIES)

    @model_validator(mode="after")
    def _says_what_to_draw(self) -> Recipe:
        family, given = self.model.family, self.calibration
        if family in LABELLED_FAMILIES and given.prompts is not None:
            raise ValueError(
                f"calibration.prompts: family {family} draws class labels and needs no embeddings; leave it out, or "
                "give calibration.classes"
            )
        if family not in LABELLED_FAMILIES and given.classes is not None:
            raise ValueError(f"calibration.classes: family {family} draws prompts, not class labels")
        if family not in LABELLED_FAMILIES and given.prompts is None:
            raise ValueError(
                "calibration.prompts: missing; it is the safetensors file with the prompt embeddings, as fp4export "
                "embed makes it"
            )
        return self

    @model_validator(mode="after")
    def _balances_what_is_known(self) -> Recipe:
        if self.method.balance and self.model.family in UNBALANCED_FAMILIES:
            raise ValueError(
                f"method.balance: of family {self.model.family} it is not known what is in front of the layers; leave "
                "it out"
            )
        return self

    @model_validator(mode="after")
    def _quantizes_something(self) -> Recipe:
        if self.preset is None and not self.layers:
            raise ValueError(f"nothing would be quantized: give a preset ({', '.join(PRESETS)}) or layers")
        return self


def load_recipe(
    path: str | Path,
    overrides: Sequence[str] = (),
    target: str | None = None,
    seed: int | None = None,
) -> Recipe:
    """Read a recipe from a file, or a shipped one by name (``digits``), and check it.

    `overrides` are ``key.path=value`` strings with YAML values, list entries by number (``layers.0.weight=e3m0``);
    their paths start from the current folder where that has them, else from the recipe's;
    `target` and `seed` (the calibration's) come last. Raises `InputError`.
    """
    file = find_recipe(path)
    name = str(path)
    changes = [_from_here(parse_override(text)) for text in overrides]
    if target is not None:
        changes.append(Override(("target",), target, f"--target {target}"))
    if seed is not None:
        changes.append(Override(("calibration", "seed"), seed, f"--seed {seed}"))
    data = apply_overrides(read_mapping(file), changes)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise InputError(_located(error, name, changes)) from error
    recipe._source_dir = file.absolute().parent
    recipe._name = name
    return recipe


def _from_here(override: Override) -> Override:
    """A path on the command line means the current folder's file, if there is one."""
    value = override.value
    if override.location in _PATHS and isinstance(value, str) and value and Path(value).expanduser().exists():
        return replace(override, value=str(Path(value).expanduser().absolute()))
    return override


def _located(error: ValidationError, name: str, changes: Sequence[Override]) -> str:
    """The error as one line that blames the flag which set the value, or else the file."""
    problem = explain(error, Recipe)
    for change in reversed(changes):
        shared = min(len(change.location), len(problem.location))
        if shared and problem.location[:shared] == change.location[:shared]:
            return f"{change.text}: {problem.path}: {problem.message}"
    return f"{name}: {problem.path}: {problem.message}" if problem.path else f"{name}: {problem.message}"


def recipe_to_yaml(recipe: Recipe) -> str:
    """The recipe with every default filled in and paths made absolute, so that it works from any folder."""
    data: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    for section, key in _PATHS:
        given = data[section].get(key)
        # A Hub id stays what it is: no folder of that name exists here.
        if given is not None and (recipe.resolve_path(given).exists() or key != "weights"):
            data[section][key] = str(recipe.resolve_path(given))
    return f"# Resolved from {recipe.name}: every default filled in.\n{dump_yaml(data)}"
