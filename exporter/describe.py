"""What an export would do, found out without weights and without writing anything: `--dry-run`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from exporter.container_choice import accumulator_text, exact_text
from exporter.job import fitted_target
from exporter.layer_bytes import stored_bytes
from exporter.layer_section import HIGH_PRECISION, NO_SHIFT
from exporter.models.adapter import Adapter
from exporter.models.families import recipe_adapter
from exporter.models.loading import model_shapes, skeleton
from exporter.models.location import locate_config
from exporter.plan import LayerPlan, Plan, plan_layers
from exporter.recipe import Recipe
from exporter.targets import Target, TargetChoice, resolve_target
from plugins.container_product import ContainerProduct

_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True)
class Description:
    """The plan of an export, the target with the reason for it, and what a real run would stumble over.

    `repeated_bytes` are those of modules that become one if, as usual, every block stores the same.
    """

    output: Path
    choice: TargetChoice
    plan: Plan
    warnings: tuple[str, ...]
    repeated_bytes: int = 0


def describe(recipe: Recipe, output: str | Path) -> Description:
    """Plan `recipe` for `output` from the model's config alone; writes nothing. Raises `InputError`."""
    path = Path(output)
    return describe_for(recipe, path, resolve_target(recipe.target, path))


def describe_for(recipe: Recipe, path: Path, choice: TargetChoice) -> Description:
    """`describe` for a target that is chosen already."""
    choice = fitted_target(recipe, choice)
    found = locate_config(recipe)
    adapter = recipe_adapter(recipe.model)
    model = skeleton(found.content, adapter, found.file)
    adapter.latent_shape(model, recipe.model.resolution)
    plan = plan_layers(recipe, model_shapes(model, adapter), adapter.kept_layers(model), choice.target)
    warnings = _warnings(recipe, path, found.weights_missing, plan.vnni_note(choice.target))
    return Description(path, choice, plan, tuple(warnings), _repeated_bytes(model, adapter))


def _repeated_bytes(model: nn.Module, adapter: Adapter) -> int:
    """Size in FP32 of what all blocks but the first store once more."""
    if not adapter.stored_by_every_block:
        return 0
    others = [block.get_submodule(adapter.stored_by_every_block) for _, block in adapter.blocks(model)[1:]]
    return sum(parameter.numel() * 4 for module in others for parameter in module.parameters())


def _warnings(recipe: Recipe, output: Path, *known: str | None) -> list[str]:
    warnings = [warning for warning in known if warning]
    if not output.parent.is_dir():
        warnings.append(f"the folder {output.parent} does not exist: mkdir -p {output.parent}")
    for key, given in (
        ("calibration.prompts", recipe.calibration.prompts),
        ("evaluation.classifier", recipe.evaluation.classifier),
    ):
        if given is not None and not recipe.resolve_path(given).is_file():
            warnings.append(f"{key}: {recipe.resolve_path(given)} does not exist")
    return warnings


def print_description(description: Description, console: Console) -> None:
    """Print target, every layer, what stays in high precision, sizes and warnings."""
    plan, target = description.plan, description.choice.target
    console.print(f"output  {description.output}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"target  {target.name} ({description.choice.reason})", markup=False, highlight=False)
    console.print(f"compute {plan.compute} outside the quantized linears", markup=False, highlight=False)
    console.print(f"kernels {target.kernels}", markup=False, highlight=False)
    console.print(f"storage {target.storage_text}", markup=False, highlight=False)
    console.print(layer_plan_table(plan.layers, target))
    if transforms_text(plan.layers):
        console.print(f"transforms {transforms_text(plan.layers)}", markup=False, highlight=False)
    for line in [*open_formats(plan), *exactness(plan)]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(_high_precision_table(plan))
    ratio = plan.expected_bytes / plan.fp32_bytes
    console.print(
        f"size    {size_text(plan.fp32_bytes)} in FP32 -> {size_text(plan.expected_bytes)} expected ({ratio:.3f})",
        highlight=False,
    )
    repeated = description.repeated_bytes
    if repeated:
        smaller = plan.expected_bytes - repeated
        ratio = smaller / (plan.fp32_bytes - repeated)
        console.print(
            f"        or {size_text(smaller)} ({ratio:.3f}) where all blocks store the "
            "same embedders, as published checkpoints do: they become one",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    for warning in description.warnings:
        console.print(f"warning: {warning}", markup=False, highlight=False, soft_wrap=True)


def open_formats(plan: Plan) -> list[str]:
    """A line for every choice that `weight: auto` leaves: how many layers have it; what is no candidate, and why."""
    choices = Counter(
        (
            tuple(f"{one.weight_format} ({one.scales} scales)" for one in layer.candidates),
            tuple(f"{fmt}: {reason}" for fmt, reason in layer.refused.items()),
        )
        for layer in plan.open
    )
    return [
        f"weight: auto: {count} layers will be one of {', '.join(candidates)}, above as the first of them"
        + (f"; not {'; '.join(refused)}" if refused else "")
        for (candidates, refused), count in choices.items()
    ]


def exactness(plan: Plan) -> list[str]:
    """A line for every pair of formats in a container: whether it is exact and why, for its longest sums. Nothing is
    said of block scaling, whose scales are inside the sums."""
    longest: dict[tuple[str, str, str, bool], ContainerProduct] = {}
    for layer in sorted(plan.layers, key=lambda layer: layer.in_features):
        if layer.product is not None:
            key = (layer.container, layer.weight_format, layer.activation_format, layer.product.free_groups)
            longest[key] = layer.product
    return [
        f"{container}: {weights} weights, {activations} activations: {'' if product.exact else 'not '}exact: "
        f"{product.reason}"
        for (container, weights, activations, _), product in longest.items()
    ]


def transforms_text(layers: Sequence[LayerPlan]) -> str:
    """How many read a rotated or shifted input, have a branch of low rank, round their output; "" if none do."""
    rotated = sum(bool(layer.hadamard) for layer in layers)
    shifted = sum(layer.shift != NO_SHIFT for layer in layers)
    branched = sum(bool(layer.low_rank) for layer in layers)
    outputs = Counter(_layer_output(layer) for layer in layers if layer.output_format != HIGH_PRECISION)
    parts = (
        f"{rotated} rotated" * bool(rotated),
        f"{shifted} shifted" * bool(shifted),
        f"{branched} with a branch of low rank" * bool(branched),
        *(f"{count} with an output in {output}" for output, count in outputs.items()),
    )
    return ", ".join(part for part in parts if part)


def layer_plan_table(layers: Sequence[LayerPlan], target: Target) -> Table:
    """Formats, container and expected size of every layer that is quantized."""
    table = Table(title=f"{len(layers)} quantized layers", title_justify="left")
    table.add_column("layer", no_wrap=True)
    for heading in ("weights", "scales", "group", "activations", "container", "exact"):
        table.add_column(heading)
    for heading in ("sum bits", "N x K", "FP32", "expected"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in layers:
        table.add_row(*_row(layer, target))
    return table


def _row(layer: LayerPlan, target: Target) -> tuple[str, ...]:
    return (
        layer.name,
        layer.weight_format,
        layer.scales,
        str(layer.group_size or "row"),
        _activations_text(layer),
        layer.container,
        exact_text(layer.product),
        accumulator_text(layer.product),
        f"{layer.out_features} x {layer.in_features}",
        size_text(layer.fp32_bytes),
        size_text(stored_bytes(layer, target)),
    )


def _activations_text(layer: LayerPlan) -> str:
    rotation = f", rotated by {layer.hadamard}" if layer.hadamard else ""
    shift = "" if layer.shift == NO_SHIFT else f", {layer.shift} shifted"
    output = "" if layer.output_format == HIGH_PRECISION else f", output {_layer_output(layer)}"
    return f"{layer.activation_format}{rotation}{shift}{output}"


def _layer_output(layer: LayerPlan) -> str:
    return output_text(layer.output_format, layer.output_group)


def output_text(fmt: str, group_size: int) -> str:
    """How a layer's output is rounded: ``e4m3``, or with a scale for so many neighbours ``e4m3/72``."""
    return fmt + (f"/{group_size}" if group_size else "")


def _high_precision_table(plan: Plan) -> Table:
    table = Table(title=f"{len(plan.high_precision)} modules in high precision", title_justify="left")
    table.add_column("module", no_wrap=True)
    table.add_column("parameters", justify="right")
    for name, count in plan.high_precision:
        table.add_row(name, f"{count:,}")
    return table


def size_text(count: float) -> str:
    """Bytes as people read them: ``2.4 MB``."""
    for unit in _UNITS[:-1]:
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} {_UNITS[-1]}"
