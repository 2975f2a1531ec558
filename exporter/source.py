"""What an export starts from: the original model, its prompts, and the plan of what becomes of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from exporter.calibration.activations import ActivationStore, choose_store
from exporter.calibration.capture import CalibrationSet
from exporter.calibration.format_choice import LayerFormats
from exporter.calibration.inputs import CalibrationRun
from exporter.calibration.placement import Placement, choose_placement, module_bytes
from exporter.errors import InputError
from exporter.files import sha256_of
from exporter.job import Job
from exporter.layer_section import HIGH_PRECISION
from exporter.memory import usable_memory
from exporter.models.adapter import Adapter
from exporter.models.families import recipe_adapter
from exporter.models.generic import GenericAdapter
from exporter.models.inputs import TransformerInputs
from exporter.models.loading import load_transformer, model_shapes
from exporter.models.location import CONFIG, ModelFiles, locate_model
from exporter.models.prompts import Prompts, class_prompts, load_prompts, spread_labels
from exporter.models.weight_files import weight_files
from exporter.plan import Plan, plan_layers
from exporter.quality import class_accuracy
from exporter.recipe import Recipe
from exporter.sampling import transformer_inputs
from exporter.shards import Shard

# Inputs, targets and outputs.
_BLOCK_COPIES = 3
# Axes of a condition that has no tokens, such as a mask: prompts and values.
_WITHOUT_TOKENS = 2


@dataclass(frozen=True)
class Source:
    """The loaded original. `identity` names the exact bytes of everything that was read.

    `store` is where calibration keeps activations, `memory` how many bytes it may have of what is not in files, and
    `placement` where it computes; `formats` say how those of open layers were chosen.
    """

    model: nn.Module
    adapter: Adapter
    prompts: Prompts
    plan: Plan
    files: ModelFiles
    latent_shape: tuple[int, int, int]
    identity: dict[str, str]
    store: ActivationStore = field(default_factory=ActivationStore)
    memory: int | None = None
    placement: Placement = field(default_factory=Placement)
    formats: tuple[LayerFormats, ...] = ()

    @property
    def denoiser(self) -> Callable[[TransformerInputs], Tensor]:
        """The original's noise prediction."""
        return partial(self.adapter.predict_noise, self.model)

    def example_inputs(self, batch: int) -> TransformerInputs:
        """Inputs of the sizes that the export is for: noise, with the first prompts in turn."""
        latents = torch.randn(batch, *self.latent_shape, generator=torch.Generator().manual_seed(0))
        timesteps = torch.linspace(999.0, 1.0, batch).round()
        inputs = transformer_inputs(latents, timesteps, torch.arange(batch) % self.prompts.count, self.prompts)
        return self.adapter.with_conditions(self.model, inputs)

    def calibration_run(
        self, captured: CalibrationSet, weights: Tensor | None = None, shard: Shard | None = None
    ) -> CalibrationRun:
        """The captured inputs through the model, where calibration computes; `weights` are what samples count. Without
        a `shard` this process has all of them."""
        return CalibrationRun(
            self.adapter,
            captured,
            self.prompts,
            self.store,
            self.placement.limit(),
            shard or Shard(),
            self.placement,
            weights,
            self.memory,
        )

    def layer_facts(self) -> list[dict[str, object]]:
        """What codes and scales depend on, per layer: everything but the containers' names. Of an open layer also what
        it may become."""
        candidates = {layer.name: [one.weight_format for one in layer.candidates] for layer in self.plan.open}
        return [
            {**{key: value for key, value in asdict(layer).items() if _decides(key, value)}, "m": layer.multipliers}
            | ({"candidates": candidates[layer.name]} if layer.name in candidates else {})
            for layer in self.plan.layers
        ]


def load_source(job: Job) -> Source:
    """Load and check all that the recipe names, before anything takes long. Raises `InputError`."""
    recipe = job.recipe
    placement = choose_placement(recipe.calibration.device, recipe.calibration.device_memory, job.shard)
    files = locate_model(recipe)
    adapter = recipe_adapter(recipe.model)
    model = load_transformer(files.transformer, adapter, recipe.model.variant)
    prompts = _prompts(recipe, adapter, model)
    plan = plan_layers(recipe, model_shapes(model, adapter), adapter.kept_layers(model), job.target)
    latent_shape = adapter.latent_shape(model, recipe.model.resolution)
    _check_classifier(job, prompts, latent_shape)
    memory = calibration_memory(recipe)
    captions = caption_tokens(tensor.shape for tensor in prompts.positive.values())
    activations = kept_activations(recipe, adapter, model, latent_shape, captions)
    store = choose_activation_store(job, activations, largest_block(adapter, model), memory, placement)
    weights = weight_files(files.transformer, recipe.model.variant)
    read = {file.name: file for file in (files.transformer / CONFIG, *weights)}
    if recipe.calibration.prompts is not None:
        read["prompts"] = recipe.resolve_path(recipe.calibration.prompts)
    if files.scheduler is not None:
        read["scheduler"] = files.scheduler
    source = Source(
        model=model,
        adapter=adapter,
        prompts=prompts,
        plan=plan,
        files=files,
        latent_shape=latent_shape,
        identity=_checksums(read),
        store=store,
        memory=memory,
        placement=placement,
    )
    if placement.on_gpu:
        most = f"{placement.memory / 1e9:.1f} GB"
        job.progress.note(f"calibrating on {placement.device}, in at most {most} of its memory")
    if isinstance(adapter, GenericAdapter):
        adapter.check(model, source.example_inputs(batch=2))
    return source


def _checksums(files: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 by name, of as many files at once as there are cores."""
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(files, pool.map(sha256_of, files.values()), strict=True))


def _decides(key: str, value: object) -> bool:
    """Whether codes and scales depend on a layer's entry; a transform that is not made says nothing."""
    if key in ("low_rank", "hadamard", "output_format", "output_group", "shift"):
        return value not in (0, HIGH_PRECISION)
    return key not in ("container", "asked_container")


def _prompts(recipe: Recipe, adapter: Adapter, model: nn.Module) -> Prompts:
    """The embeddings that the recipe names, or class labels."""
    settings, conditions = recipe.calibration, adapter.conditions(model)
    if settings.prompts is not None:
        return load_prompts(recipe.resolve_path(settings.prompts), conditions)
    (label,) = conditions
    classes = settings.classes or spread_labels(label.classes, settings.samples)
    if max(classes) >= label.classes:
        raise InputError(
            f"{recipe.name}: calibration.classes: {max(classes)} is over the model's last class, {label.classes - 1}"
        )
    return class_prompts(label, classes, adapter.negative_label(model))


def calibration_memory(recipe: Recipe) -> int:
    """Bytes that calibration may have of what is not in files."""
    given = recipe.calibration.memory
    return int(given * 1e9) if given is not None else usable_memory() // 2


def largest_block(adapter: Adapter, model: nn.Module) -> int:
    """Bytes of the largest block's weights."""
    return max((module_bytes(block) for _, block in adapter.blocks(model)), default=0)


def caption_tokens(conditions: Iterable[Sequence[int]]) -> int:
    """Tokens of all captions of a prompt, of whose conditions these are the shapes."""
    return sum(shape[1] for shape in conditions if len(shape) > _WITHOUT_TOKENS)


def kept_activations(
    recipe: Recipe, adapter: Adapter, model: nn.Module, latent_shape: tuple[int, int, int], captions: int
) -> int:
    """Bytes of the activations of all captured inputs that block reconstruction keeps, with captions of so many tokens.

    The model's weights need not be there.
    """
    if recipe.method.name != "fp4dit":
        return 0
    skips = sum(map(len, adapter.skips(model).values()))
    return recipe.calibration.inputs * activation_bytes(
        adapter.block_output_size(model, latent_shape), skips, captions * adapter.config(model).inner_dim
    )


def choose_activation_store(
    job: Job, activations: int, block: int, memory: int, placement: Placement
) -> ActivationStore:
    """Where so many bytes of all processes' activations are kept, of a model whose largest block has `block` bytes.

    Raises `EnvironmentLacksError` where nothing has room.
    """
    if not activations:
        return ActivationStore()
    if placement.keeps(activations // job.shard.world, block):
        return ActivationStore(device=placement.device)
    settings = job.recipe.calibration
    store = choose_store(settings.samples, activations // settings.samples, memory, job.work.path)
    if store.folder is not None:
        job.progress.note(
            f"activations of {settings.inputs} inputs: up to {activations / 1e9:.1f} GB in files in {store.folder}, "
            f"since calibration.memory is {memory / 1e9:.1f} GB"
        )
    return store


def activation_bytes(block_output: int, skips: int, shared: int) -> int:
    """Bytes per captured input that block reconstruction keeps at its peak, in float32.

    A block's inputs, targets and outputs of `block_output` numbers; the outputs of both networks that `skips` blocks
    take later; `shared` numbers that all blocks take.
    """
    return 4 * ((_BLOCK_COPIES + 2 * skips) * block_output + shared)


def _check_classifier(job: Job, prompts: Prompts, latent_shape: tuple[int, int, int]) -> None:
    """Let the classifier judge blank samples, so that one that cannot judge is found before hours of work."""
    given = job.recipe.evaluation.classifier
    if given is None:
        return
    path = job.recipe.resolve_path(given)
    if not path.is_file():
        raise InputError(f"{job.recipe.name}: evaluation.classifier: {path} does not exist")
    if prompts.labels is None:
        raise InputError(
            f"{job.recipe.name}: evaluation.classifier needs a tensor 'labels' in {job.recipe.calibration.prompts}"
        )
    class_accuracy(torch.zeros(prompts.count, *latent_shape), prompts.labels, path)
