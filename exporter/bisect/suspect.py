"""What is bisected: a graph with the reference that its export kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from exporter.device.program import BUNDLE_SUFFIX
from exporter.errors import InputError
from exporter.gate.records import Reference
from exporter.gate.segments import is_large
from exporter.gate.table import Stage
from exporter.onnx_files import checksum_of, read_model
from exporter.onnx_input.model import GraphState, state_of
from exporter.origin import Origin, origin_path
from exporter.passes.layer_table import TARGET_KEY, LayerEntry, read_layer_table
from exporter.passes.tiling import untiled
from exporter.targets import Target, get_target


@dataclass(frozen=True)
class Suspect:
    """A graph, untiled so that every layer is seen, and the reference as its stage is compared with it.

    `work` is the work folder that the reference is from; `notes` say what the file itself already tells. A large graph
    is run `segmented`, in the memory of a block.
    """

    path: Path
    model: onnx.ModelProto
    layers: tuple[LayerEntry, ...]
    stage: Stage
    target: Target
    reference: Reference
    work: Path
    notes: tuple[str, ...]
    segmented: bool

    @property
    def optimized(self) -> bool:
        """Whether ONNX Runtime's own fusions belong to how this graph runs."""
        return self.stage == "exported" or self.target.engine == "onnxruntime"

    @property
    def exported(self) -> Path:
        """The exported graph of the same target, where every quantizer is one node."""
        return self.work / f"exported.{self.target.name}.onnx"


def open_suspect(path: Path) -> Suspect:
    """Read a graph and find its reference: beside an output by its origin, in a work folder by the target's name.

    Raises `InputError` for what is no graph of an export, or has no reference any more.
    """
    if BUNDLE_SUFFIX in (path.suffix, path.parent.suffix):
        raise InputError(
            f"{path}: a bundle carries no more of the reference than the model's output; bisect the graph in the work "
            "folder of the export that wrote it: fp4export bisect NAME.work/lowered.TARGET.onnx"
        )
    if not path.is_file():
        raise InputError(
            f"{path}: no such file; bisect takes an output that fp4export wrote, or a graph in its work folder"
        )
    light = read_model(path, external_data=False)
    state = state_of(light)
    if state is GraphState.FOREIGN:
        raise InputError(f"{path}: was not made by fp4export, so there is no reference to bisect it with")
    stage: Stage = "exported" if state is GraphState.WAIST else "lowered"
    target = _target_of(light)
    gate, notes = _reference_folder(path, target)
    model = untiled(read_model(path))
    layers = read_layer_table(model)
    return Suspect(
        path=path,
        model=model,
        layers=layers,
        stage=stage,
        target=target,
        reference=Reference.load(gate).for_stage(stage),
        work=gate.parent,
        notes=notes,
        segmented=is_large(layers),
    )


def _reference_folder(path: Path, target: Target) -> tuple[Path, tuple[str, ...]]:
    if not origin_path(path).is_file():
        gate = path.parent / f"gate.{target.name}"
        if not gate.is_dir():
            raise InputError(
                f"{path}: neither {origin_path(path).name} nor {gate.name} is beside it, so there is no reference; "
                "give the output of an export, or a graph in its work folder"
            )
        return gate, ()
    origin = Origin.load(path)
    if checksum_of(path) == origin.output_sha256:
        return origin.gate, ()
    return origin.gate, (f"{path.name} has changed since it was exported (SHA-256 differs): export again to repair it",)


def _target_of(model: onnx.ModelProto) -> Target:
    return get_target(next(entry.value for entry in model.metadata_props if entry.key == TARGET_KEY))
