"""The shipped assembly, run by a model of its instructions, against the formats' tables: every octet in every place."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from plugins.containers import INT8, multipliers
from plugins.formats import FORMATS
from plugins.packed_linear.asm import decoder, e4m3_to_half
from plugins.packed_linear.encoding import Element, Encoding
from tests.plugins.ptx_model import run_ptx

DTYPES = {
    Element.INT8: np.dtype(np.int8),
    Element.FP8: np.dtype(ml_dtypes.float8_e4m3fn),
    Element.FP16: np.dtype(np.float16),
    Element.BF16: np.dtype(ml_dtypes.bfloat16),
}
FOUR_BITS = ("e2m1", "e1m2", "e3m0", "int4")
SIX_BITS = ("e2m3", "e3m2")
ENCODINGS = [
    Encoding(FORMATS[name], element)
    for name in (*FOUR_BITS, *SIX_BITS)
    for element in Element
    if not (name == "e3m2" and element is Element.INT8)
]


def identify(encoding: Encoding) -> str:
    return f"{encoding.fmt.name}-{encoding.element.value}"


def registers_of(octets: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(octets, np.uint8).view("<u4").reshape(-1).astype(np.uint32)


def numbers_of(registers: list[np.ndarray], element: Element) -> np.ndarray:
    """[blocks, 4] numbers of one operand."""
    octets = np.stack(registers, axis=-1).astype("<u4").view(np.uint8)
    return np.ascontiguousarray(octets).view(DTYPES[element]).reshape(-1, 4).astype(np.float64)


def is_canonical(fields: np.ndarray, encoding: Encoding) -> np.ndarray:
    """No -0 and, in two's complement, no -8: `Layout.pack` writes neither."""
    return fields != (8 if encoding.twos_complement else 1)


def test_model_permutes_bytes_as_the_isa_says() -> None:
    table = (np.uint32(0x83020180), np.uint32(0x07060584))
    [result] = run_ptx("{\n\nprmt.b32 $0, $1, $2, $3;\n}", 1, [*map(np.asarray, table), np.asarray(0x8BF4, np.uint32)])
    assert int(result) == 0xFFFF0084
    with pytest.raises(ValueError, match="no model of 'vadd4"):
        run_ptx("{\n\nvadd4.u32.u32.u32 $0, $1, $2, $3;\n}", 1, [])


def every_octet_in_every_place() -> np.ndarray:
    return np.array([[value if at == place else (37 * value + 91 * at) % 256 for at in range(4)]
                     for value in range(256) for place in range(4)], np.uint8)  # fmt: skip


@pytest.mark.parametrize("encoding", [entry for entry in ENCODINGS if entry.fmt.bits == 4], ids=identify)
def test_every_octet_in_every_place(encoding: Encoding) -> None:
    octets = every_octet_in_every_place()
    count = encoding.element.bits // 8
    outputs = run_ptx(decoder(encoding), 2 * count, [registers_of(octets)])
    for fields, registers in ((octets & 15, outputs[:count]), (octets >> 4, outputs[count:])):
        canonical = is_canonical(fields, encoding)
        found = numbers_of(registers, encoding.element)
        np.testing.assert_array_equal(found[canonical], encoding.numbers[fields][canonical])


@pytest.mark.parametrize("name", ["e2m1", "e3m0"])
def test_every_octet_times_every_multiplier(name: str) -> None:
    encoding = Encoding(FORMATS[name], Element.INT8)
    octets = every_octet_in_every_place()
    for multiplier in multipliers(encoding.fmt, INT8):
        factor = np.full(len(octets), multiplier, np.uint32)
        low, high = run_ptx(decoder(encoding, folded=True), 2, [registers_of(octets), *[factor] * 4])
        for fields, register in ((octets & 15, low), (octets >> 4, high)):
            canonical = is_canonical(fields, encoding)
            expected = encoding.numbers[fields] * multiplier
            np.testing.assert_array_equal(numbers_of([register], Element.INT8)[canonical], expected[canonical])


@pytest.mark.parametrize("pair", [0, 1])
@pytest.mark.parametrize("encoding", [entry for entry in ENCODINGS if entry.fmt.bits == 6], ids=identify)
def test_every_six_bit_field_in_every_place(encoding: Encoding, pair: int) -> None:
    low, high = (values.reshape(-1, 4).astype(np.uint8) for values in np.divmod(np.arange(65536), 256))
    low, high = (np.concatenate([np.roll(octets, place, axis=1) for place in range(4)]) for octets in (low, high))
    count = encoding.element.bits // 8
    outputs = run_ptx(decoder(encoding, pair), 2 * count, [registers_of(low), registers_of(high)])
    for half, registers in enumerate((outputs[:count], outputs[count:])):
        top = high >> (2 * (pair + 2 * half)) & 3
        fields = (top >> 1) | ((low >> (4 * half) & 15) << 1) | ((top & 1) << 5)
        canonical = is_canonical(fields, encoding)
        found = numbers_of(registers, encoding.element)
        np.testing.assert_array_equal(found[canonical], encoding.numbers[fields][canonical])


@pytest.mark.parametrize("encoding", ENCODINGS, ids=identify)
def test_numbers_are_values_times_one_power_of_two(encoding: Encoding) -> None:
    """Against the format's own table: sums of numbers times `factor` are sums of values, of numerators for INT8."""
    fields = np.arange(2**encoding.fmt.bits)
    valid = is_canonical(fields, encoding)
    codes = encoding.layout(len(fields), 0).unpack(encoding.layout(len(fields), 0).pack(_codes(encoding)))
    step = encoding.fmt.step if encoding.element is Element.INT8 else 1.0
    values = encoding.fmt.decode(codes[0]).astype(np.float64) / step
    np.testing.assert_array_equal(np.sort(encoding.numbers[valid] * encoding.factor), np.unique(values))
    assert np.log2(encoding.factor) % 1 == 0
    assert np.array_equal(encoding.numbers.astype(DTYPES[encoding.element]).astype(np.float64), encoding.numbers)


def _codes(encoding: Encoding) -> np.ndarray:
    codes = np.arange(2**encoding.fmt.bits, dtype=np.uint8)
    return np.where(encoding.fmt.valid, codes, 0).astype(np.uint8)[None]


def test_every_e4m3_byte_in_every_place() -> None:
    octets = np.array([[value, 255 - value, (7 * value) % 256, (value + 128) % 256] for value in range(256)], np.uint8)
    found = numbers_of(run_ptx(e4m3_to_half(), 2, [registers_of(octets)]), Element.FP16)
    values = octets.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    finite = np.isfinite(values)
    np.testing.assert_array_equal(found[finite], values[finite] / 256)
