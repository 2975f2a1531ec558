"""The parsers' lists: consistent with each other, with the targets, and with the one real parser that is at hand."""

from __future__ import annotations

import importlib.util

import onnx
import pytest
from onnx import TensorProto

from exporter.targets import TARGETS
from exporter.tensorrt_parsers import PARSERS


def test_every_tensorrt_target_names_a_parser() -> None:
    for target in TARGETS.values():
        assert bool(target.parsers) == (target.engine != "onnxruntime")
        assert set(target.parsers) <= set(PARSERS)
    assert TARGETS["orin"].parsers == ("10.3", "11")


def test_lists_name_operators_that_exist() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if not schema.domain}
    for parser in PARSERS.values():
        assert parser.operators <= known
        for operators in parser.quantized_types.values():
            assert operators <= parser.operators | parser.extensions


def test_later_releases_take_what_earlier_ones_took() -> None:
    early, late = PARSERS["10.3"], PARSERS["11"]
    assert early.operators < late.operators
    assert early.types <= late.types
    assert all(late.takes(kind, op) for kind, operators in early.quantized_types.items() for op in operators)


def test_float4_is_for_quantizers_of_later_releases() -> None:
    assert not PARSERS["10.3"].takes(TensorProto.FLOAT4E2M1, "DequantizeLinear")
    assert PARSERS["11"].takes(TensorProto.FLOAT4E2M1, "DequantizeLinear")
    assert not PARSERS["11"].takes(TensorProto.FLOAT4E2M1, "Transpose")
    assert not PARSERS["11"].takes(TensorProto.DOUBLE, "Cast")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs the extra 'rtx'")
def test_the_real_parser_takes_every_operator_of_the_list_of_11() -> None:
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    listed = PARSERS["11"].operators | PARSERS["11"].extensions
    assert [operator for operator in sorted(listed) if not parser.supports_operator(operator)] == []
    assert not parser.supports_operator("MatMulInteger")
