"""A builder for the standard-operator bodies of the project's functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from plugins.domain import DOMAIN, MIN_BODY_OPSET


class OpsetError(ValueError):
    """A version of the standard operators in which the bodies cannot be written."""


class Body:
    """Collects nodes whose tensor names start with `prefix`; every call gives the name of its output."""

    def __init__(self, prefix: str = "") -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.prefix = prefix

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes: int | Sequence[int]) -> str:
        """Append a node of the standard domain with one output."""
        name = output or f"{self.prefix}{op_type.lower()}_{len(self.nodes)}"
        node = helper.make_node(op_type, inputs, [name], name=f"{name}_node")
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)
        return name

    def node(self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], domain: str, **attributes: int) -> None:
        """Append a node of another domain, or with several outputs."""
        node = helper.make_node(op_type, inputs, outputs, name=f"{outputs[0]}_node", domain=domain)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in attributes.items())
        self.nodes.append(node)

    def constant(self, array: npt.NDArray[Any] | np.generic) -> str:
        """Append a Constant node."""
        name = f"{self.prefix}constant_{len(self.nodes)}"
        tensor = numpy_helper.from_array(np.asarray(array), name)
        self.nodes.append(helper.make_node("Constant", [], [name], name=f"{name}_node", value=tensor))
        return name

    def float(self, value: float) -> str:
        """A float32 scalar constant."""
        return self.constant(np.float32(value))

    def ints(self, *values: int) -> str:
        """A one-dimensional int64 constant."""
        return self.constant(np.array(values, np.int64))

    def function(
        self,
        op_type: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        attributes: Sequence[str],
        opset: int,
        doc: str,
    ) -> onnx.FunctionProto:
        """The collected nodes as a function of the project's domain. Raises OpsetError below MIN_BODY_OPSET."""
        if opset < MIN_BODY_OPSET:
            raise OpsetError(f"{op_type}: bodies need opset {MIN_BODY_OPSET} or later, not {opset}")
        return helper.make_function(
            DOMAIN,
            op_type,
            inputs,
            outputs,
            self.nodes,
            [helper.make_opsetid("", opset)],
            attributes=attributes,
            doc_string=doc,
        )
