"""The 1 + scale of adaptive layer norms, in the table of learned scales."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from exporter.passes.surgery import array_of, is_output, producer, replace_uses
from exporter.targets import Target


def fold_modulation_offsets(graph: gs.Graph, target: Target) -> int:
    """Add(Split(Add(table, t))[i], c) → Split(Add(table', t))[i], table' having c added to its i-th part.

    When table is a constant with no other reader that has the parts itself, c a constant of one element, and every
    reader of that part adds it. Equal up to FP32 rounding.
    """
    changed = 0
    for split in [node for node in graph.nodes if node.op == "Split" and len(node.inputs) == 1]:
        add = producer(split.inputs[0])
        table = None if add is None or add.op != "Add" else _table(add)
        axis = _axis_from_end(split)
        if table is None or axis is None or -axis > table.values.ndim or table.values.shape[axis] != len(split.outputs):
            continue
        values = np.array(table.values)
        for index, part in enumerate(split.outputs):
            offset = _common_offset(graph, part)
            if offset is None:
                continue
            np.moveaxis(values, axis, 0)[index] += np.float32(offset)
            for reader in list(part.outputs):
                output = reader.outputs[0]
                reader.outputs.clear()
                replace_uses(graph, output, part)
                reader.inputs.clear()
                changed += 1
        table.values = values
    return changed


def _axis_from_end(split: gs.Node) -> int | None:
    """The axis, counted from the last as -1, where the table's broadcast axes meet the sum's; None if not known."""
    axis, shape = int(split.attrs.get("axis", 0)), split.inputs[0].shape
    if axis < 0:
        return axis
    return None if shape is None else axis - len(shape)


def _table(add: gs.Node) -> gs.Constant | None:
    """The constant operand, when nothing else reads it nor the sum."""
    constant: gs.Constant | None = next((tensor for tensor in add.inputs if isinstance(tensor, gs.Constant)), None)
    if constant is None or constant.dtype != np.float32:
        return None
    return constant if len(constant.outputs) == 1 and len(add.outputs[0].outputs) == 1 else None


def _common_offset(graph: gs.Graph, part: gs.Tensor) -> float | None:
    """The one number that every reader of `part` adds to it, and nothing else."""
    if not part.outputs or is_output(graph, part):
        return None
    offsets = set()
    for reader in part.outputs:
        other = [array_of(tensor) for tensor in reader.inputs if tensor is not part]
        if (
            is_output(graph, reader.outputs[0])
            or reader.op != "Add"
            or len(other) != 1
            or other[0] is None
            or other[0].size != 1
            or other[0].ndim > 1
        ):
            return None
        offsets.add(float(other[0].item()))
    return offsets.pop() if len(offsets) == 1 else None
