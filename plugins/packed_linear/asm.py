"""PTX that decodes packed weights, four octets in one register at a time.

Every text works octet by octet, so that it may be applied to any four of them. Per eight weights it takes 3 (evenly
spaced formats to INT8), 11 (other 4-bit formats to INT8), 8 (to E4M3) or 12 instructions and more (to 16-bit floats).
A multiplier of INT8 numbers costs 6 instructions for all octets of a row, whose tables are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

from plugins.packed_linear.encoding import SIGNIFICAND_BITS, Element, Encoding

_ONES = 0x01010101
_HALVES = 0x00010001
_PAIR_FIELDS = ((0, 2), (1, 3))
"""The two 2-bit fields of an octet of the high plane that belong to each pair of operands."""


class _Text:
    """Lines of PTX on 32-bit registers; each call gives its result's name."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def op(self, name: str, *operands: str | int, into: str | None = None) -> str:
        target = into or f"t{len(self.lines)}"
        arguments = ", ".join(f"0x{item:08x}" if isinstance(item, int) else item for item in operands)
        self.lines.append(f"{name} {target}, {arguments};")
        return target

    def shift(self, register: str, left: int) -> str:
        if left == 0:
            return register
        return self.op("shl.b32" if left > 0 else "shr.u32", register, str(abs(left)))

    def field(self, register: str, low: int, bits: int, at: int) -> str:
        """The `bits` bits from `low` on of each octet, moved to `at`, all other bits 0."""
        return self.op("and.b32", self.shift(register, at - low), (((1 << bits) - 1) << at) * _ONES)

    def any_of(self, *registers: str) -> str:
        first, *others = registers
        for other in others:
            first = self.op("or.b32", first, other)
        return first

    def text(self) -> str:
        declared = [line.split()[1].rstrip(",") for line in self.lines]
        names = ", ".join(name for name in declared if name.startswith("t"))
        registers = f".reg .b32 {names};" if names else ""
        return "\n".join(["{", registers, *self.lines, "}"])


def decoder(encoding: Encoding, pair: int = 0, folded: bool = False) -> str:
    """PTX of inputs (octets, and the high plane's for 6-bit codes) to the numbers of their low, then high, fields.

    One output register per operand for 8-bit elements, two for 16-bit ones, in front of the inputs. `pair` says which
    half of its half of a tile the octets are of, where there is a high plane.

    `folded`: four more inputs, all of them the integer by which the four octets' numbers are multiplied. The octets are
    one row's, and no product exceeds 127.
    """
    text = _Text()
    wide = encoding.element.bits == 16
    outputs = 4 if wide else 2
    low, high = f"${outputs}", f"${outputs + 1}"
    if encoding.element is Element.INT8 and encoding.fmt.bits == 4:
        if encoding.twos_complement:
            numbers = _even_spacing(text, low)
        else:
            numbers = _looked_up(text, low, encoding, high if folded else None)
    else:
        place = encoding.octet_shift
        if encoding.fmt.bits == 4:
            octets = [_signed(text, low, nibble, place) for nibble in (0, 4)]
        else:
            fields = zip((0, 4), _PAIR_FIELDS[pair], strict=True)
            octets = [_signed_six(text, low, high, nibble, field, place) for nibble, field in fields]
        if encoding.element is Element.INT8:
            octets = [_integer(text, octet) for octet in octets]
        numbers = [half for octet in octets for half in _widened(text, octet, encoding)] if wide else octets
    for output, number in enumerate(numbers):
        text.op("mov.b32", number, into=f"${output}")
    return text.text()


def e4m3_to_half() -> str:
    """PTX of four E4M3 bytes ($2) to FP16 numbers 2^-8 times their values ($0, $1)."""
    text = _Text()
    for output, half in enumerate(_spread(text, "$2", right=1)):
        text.op("mov.b32", half, into=f"${output}")
    return text.text()


def _signed(text: _Text, octets: str, nibble: int, at: int) -> str:
    """Sign to bit 7, three magnitude bits to bit `at`."""
    return text.any_of(text.field(octets, nibble, 1, 7), text.field(octets, nibble + 1, 3, at))


def _signed_six(text: _Text, low: str, high: str, nibble: int, field: int, at: int) -> str:
    """Sign to bit 7, five magnitude bits to bit `at`."""
    return text.any_of(
        text.field(high, 2 * field + 1, 1, 7), text.field(high, 2 * field, 1, at + 4), text.field(low, nibble, 4, at)
    )


def _even_spacing(text: _Text, octets: str) -> list[str]:
    """Two's complement in the upper half of an octet is 16 times the number."""
    return [text.field(octets, 0, 4, 4), text.field(octets, 4, 4, 4)]


def _looked_up(text: _Text, octets: str, encoding: Encoding, multiplier: str | None) -> list[str]:
    """Two look-ups of eight entries each, by the lower three bits of a field, joined by XOR.

    PRMT gives a table's entry where the selector's upper bit is 0 and the entry's own sign, eight times, where it is
    1. The first table serves fields whose upper bit is 0, the second, with that bit flipped, the others. The two values
    of an index have the same sign, since the sign is its lowest bit. Positive: the other table gives 0. Negative: the
    first table holds complements, which are positive, and gives 0 to the second, which gives -1 to undo them.
    """
    values = [int(number) for number in encoding.numbers]
    first = [value if value >= 0 else ~value for value in values[:8]]
    small: Sequence[str | int] = _table(first)
    large: Sequence[str | int] = _table(values[8:])
    if multiplier is not None:
        small = _scaled(text, values[:8], multiplier)
        signs = _table([-int(value < 0) for value in values[8:]])
        large = [text.op("xor.b32", *pair) for pair in zip(_scaled(text, values[8:], multiplier), signs, strict=True)]
    flipped = text.op("xor.b32", octets, 0x88888888)
    halves = []
    for right in (0, 16):
        one = text.op("prmt.b32", *small, text.shift(octets, -right))
        other = text.op("prmt.b32", *large, text.shift(flipped, -right))
        halves.append(text.op("xor.b32", one, other))
    # The fields come in their order in memory, low and high in turn.
    return [text.op("prmt.b32", *halves, selector) for selector in (0x6420, 0x7531)]


def _scaled(text: _Text, values: Sequence[int], multiplier: str) -> list[str]:
    """A table of values times a multiplier, in two registers, negative products as their complements.

    Every octet, magnitude·m or the complement magnitude·m - 1, lies in 0…127, so that none carries into the next.
    """
    negative = [int(value < 0) for value in values]
    return [
        text.op("mad.lo.u32", multiplier, magnitude, -ones & 0xFFFFFFFF)
        for magnitude, ones in zip(_table([abs(value) for value in values]), _table(negative), strict=True)
    ]


def _table(octets: Sequence[int]) -> tuple[int, int]:
    packed = int.from_bytes(bytes(octet & 0xFF for octet in octets), "little")
    return packed & 0xFFFFFFFF, packed >> 32


def _integer(text: _Text, octet: str) -> str:
    """E2M3 sign and magnitude to eighths: 0…15 as they are, 16·(1 + m/8), 32·(1 + m/8) for exponents 2 and 3."""
    significand = text.op("or.b32", text.field(octet, 0, 3, 0), 8 * _ONES)
    top, second, sign = (text.op("mul.lo.u32", text.field(octet, bit, 1, 0), 0xFF) for bit in (4, 3, 7))
    small = text.op("and.b32", text.field(octet, 0, 4, 0), text.op("not.b32", top))
    double = text.op("and.b32", text.shift(significand, 1), text.op("not.b32", second))
    quadruple = text.op("and.b32", text.shift(significand, 2), second)
    large = text.op("and.b32", text.any_of(double, quadruple), top)
    magnitude = text.any_of(small, large)
    # -v is ~v + 1, added below bit 7 so that no octet overflows into the next.
    low = text.op("and.b32", text.op("xor.b32", magnitude, sign), 0x7F * _ONES)
    added = text.op("add.u32", low, text.field(octet, 7, 1, 0))
    return text.op("xor.b32", added, text.op("and.b32", sign, 0x80 * _ONES))


def _spread(text: _Text, octets: str, right: int) -> list[str]:
    """Four octets to the upper halves of four 16-bit numbers, their lower seven bits moved right."""
    halves = []
    for selector in (0x1404, 0x3424):
        half = text.op("prmt.b32", octets, 0, selector)
        if right:
            magnitude = text.op("and.b32", text.shift(half, -right), (0x7F00 >> right) * _HALVES)
            half = text.any_of(text.op("and.b32", half, 0x8000 * _HALVES), magnitude)
        halves.append(half)
    return halves


def _widened(text: _Text, octet: str, encoding: Encoding) -> list[str]:
    """FP16: the bits are at the bottom of its range. BF16: lifted from there, where sums in FP32 would underflow."""
    place = SIGNIFICAND_BITS[encoding.element] - encoding.mantissa_bits
    halves = _spread(text, octet, right=encoding.octet_shift + 8 - place)
    if encoding.element is Element.FP16:
        return halves
    # fma takes no immediates; -0 as the addend keeps the sign of zeros.
    lift = text.op("mov.b32", ((127 + encoding.lift) << 7) * _HALVES)
    nothing = text.op("mov.b32", 0x80008000)
    return [text.op("fma.rn.bf16x2", half, lift, nothing) for half in halves]
