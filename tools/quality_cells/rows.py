"""What is compared: methods (rows) at numbers of bits (columns), as changes of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tools.quality_cells.published_loop import SETTINGS as LOOP_SETTINGS

SEEDS = (0, 1000, 2000)
"""Calibration seeds: far enough apart that no trajectory is captured twice."""

HELD_OUT_SEED = 500_000
"""Of the trajectories that every cell is measured on."""


@dataclass(frozen=True)
class Bits:
    """Formats of the same widths: integers, the floats that a FP row uses, activations without a sign ("" if none)."""

    name: str
    integers: tuple[str, str]
    floats: tuple[str, str]
    unsigned: str = ""


W4A8 = Bits("W4A8", ("int4", "int8"), ("e2m1", "e4m3"))
W4A6 = Bits("W4A6", ("int4", "int6"), ("e2m1", "e2m3"), "ue2m4")
W4A4 = Bits("W4A4", ("int4", "int4"), ("e2m1", "e2m1"), "ue2m2")
W3A6 = Bits("W3A6", ("int3", "int6"), ("e2m0", "e2m3"), "ue2m4")
BITS = (W4A8, W4A6, W4A4, W3A6)
_FOUR_BITS = (W4A8, W4A6, W4A4)
_EIGHT_AND_SIX = (W4A8, W4A6)
_SIX_AND_FOUR = (W4A6, W4A4)

# FP4DiT publishes E3M4 at 8 bits, and E3M0 for the layer in front of the GELU.
_PUBLISHED_A8 = "e3m4"
_PUBLISHED_FIRST_FEED_FORWARD = "e3m0"

_ALL = "transformer_blocks.*"

_NEAREST = ("method.name=rtn",)
_GPTQ = ("method.name=gptq",)
ITERATIONS = 250
"""For every row that learns, but for that of `effort: best`."""
LONG = 2500
"""As many as FP4DiT publishes, for a few rows at W4A6."""
BATCH = 32
"""Samples of an iteration of the published loop: as many as the digits recipe gives to every row that learns."""

_LEARNED = ("method.name=fp4dit", f"method.iterations={ITERATIONS}")
_FROM_NEAREST = (*_LEARNED, "method.start=nearest", "method.learning_rate=0.03")
_FIRM = (*_FROM_NEAREST, "method.regularization=3000")
_FROM_GPTQ = (*_LEARNED, "method.start=gptq", "method.learning_rate=0.01")
_BEST = ("method.effort=best",)
_BEHIND_GELU = "*.ff.net.2"
_ROTATED = ((_BEHIND_GELU, "hadamard: 64"),)
# What attention reads, on the activations' grid; heads of both models are 64 wide.
_ATTENTION = (("*.to_?", "output: {activation}, output_group: 64"),)
_WEIGHTED = "method.step_weights=trajectory"
_BF16 = "method.compute=bf16"
_LONG = f"method.iterations={LONG}"
_JOINT = "method.quantize_activations=true"
_ABSMAX = "method.scale_search=absmax"
_LOOP = (*_NEAREST, _ABSMAX)
# At three bits there is one float only.
_CHOSEN = ("e2m1",)


@dataclass(frozen=True)
class Row:
    """A method: `formats` are integers, floats, floats as FP4DiT publishes them, floats with integer activations
    ("mixed"), or floats chosen layer by layer ("auto"); `transforms` are what rules say of layers beside that, by
    pattern, where {activation} stands for the activations' format. `zero_points`: integer activations have
    a zero point per token. `unsigned`: what a GELU makes is shifted and quantized without a sign. `published_loop`: so
    many iterations of `calibrate_as_published`, if any, instead of the recipe's method. `at`: the widths that it is
    measured at. The published loop has 4-bit floats only, and activations of 8 bits all have a sign."""

    key: str
    title: str
    formats: Literal["integers", "floats", "published", "mixed", "auto"]
    method: tuple[str, ...]
    balance: Literal[False, True, "exact"] = False
    transforms: tuple[tuple[str, str], ...] = ()
    zero_points: bool = False
    unsigned: bool = False
    published_loop: int = 0
    weight: str = ""
    at: tuple[Bits, ...] = BITS

    def changes(self, bits: Bits) -> tuple[str, ...]:
        """The recipe's changes for these bits."""
        weight = self.weight or (bits.integers if self.formats == "integers" else bits.floats)[0]
        activation = (bits.integers if self.formats in ("integers", "mixed") else bits.floats)[1]
        if self.formats == "auto" and weight in _CHOSEN:
            weight = "auto"
        formats = f"weight: {weight}, activation: {activation}, {self._grouping}"
        transforms = [(match, transform.format(activation=activation)) for match, transform in self.transforms]
        rules = [f"{{match: '{match}', {formats}, {transform}}}" for match, transform in transforms]
        if self.unsigned and bits.unsigned:
            shifted = f"weight: {weight}, activation: {bits.unsigned}, {self._grouping}, shift: gelu"
            rules.append(f"{{match: '{_BEHIND_GELU}', {shifted}}}")
        if all(match != _ALL for match, _ in self.transforms):
            rules.append(f"{{match: '{_ALL}', {formats}}}")
        if self.formats == "published":
            activation = _PUBLISHED_A8 if activation == "e4m3" else activation
            first = _PUBLISHED_FIRST_FEED_FORWARD if weight == "e2m1" else weight
            rules = [
                f"{{match: '*.ff.net.0.proj', weight: {first}, activation: {activation}, {self._grouping}}}",
                f"{{match: '{_ALL}', weight: {weight}, activation: {activation}, {self._grouping}}}",
            ]
        return (f"layers=[{', '.join(rules)}]", f"method.balance={str(self.balance).lower()}", *self.method)

    @property
    def loop_settings(self) -> tuple[float, ...]:
        """Of the published loop, which no recipe describes, what its cells depend on; empty for other rows."""
        return (self.published_loop, BATCH, *LOOP_SETTINGS) if self.published_loop else ()

    @property
    def _grouping(self) -> str:
        # Foldable scales are what ships; the others are a little freer.
        return f"group: 128, scales: {'group' if self.formats in ('integers', 'published') else 'foldable'}"


_PUBLISHED = "floats, FP4DiT's formats and scales"
_FIRMLY = "penalty 100 times as large"
_UNSIGNED = "unsigned behind the GELU"
_JOINTLY = "activations quantized while learning"
_INTEGERS = (
    Row("int_nearest", "integers, round to nearest", "integers", _NEAREST),
    Row("int_adaround", "integers, AdaRound, block reconstruction", "integers", _FROM_NEAREST),
    Row("int_gptq", "integers, GPTQ", "integers", _GPTQ),
    Row("int_ours", "integers, balanced, GPTQ, then AdaRound", "integers", _FROM_GPTQ, balance=True),
)
_FLOATS = (
    Row("fp_nearest", "floats, round to nearest", "floats", _NEAREST),
    Row("fp4dit", f"{_PUBLISHED}, AdaRound", "published", (*_FROM_NEAREST, _ABSMAX)),
    Row("fp4dit_loop", "floats, FP4DiT's own loop", "published", _LOOP, published_loop=ITERATIONS, at=_FOUR_BITS),
    Row("fp_adaround", "floats, AdaRound, block reconstruction", "floats", _FROM_NEAREST),
    Row("fp_gptq", "floats, GPTQ", "floats", _GPTQ),
    Row("fp_fast", "floats, balanced, GPTQ (ours, `fast`)", "floats", _GPTQ, balance=True),
    Row("ours", "**floats, balanced, GPTQ, then AdaRound (ours, `default`)**", "floats", _FROM_GPTQ, balance=True),
    Row("mixed", "float weights, integer activations, `default`", "mixed", _FROM_GPTQ, balance=True),
)
_VARIANTS = (
    Row("int_absmax", "integers, AdaRound, absmax scales", "integers", (*_FROM_NEAREST, _ABSMAX)),
    Row("int_firm", f"integers, AdaRound, {_FIRMLY}", "integers", _FIRM, at=_EIGHT_AND_SIX),
    Row("fp4dit_firm", f"{_PUBLISHED}, AdaRound, {_FIRMLY}", "published", (*_FIRM, _ABSMAX), at=_EIGHT_AND_SIX),
    Row("fp_firm", f"floats, AdaRound, {_FIRMLY}", "floats", _FIRM, at=_EIGHT_AND_SIX),
    Row("fp_bf16", "floats, `default`, learned in BF16", "floats", (*_FROM_GPTQ, _BF16), True),
    Row("fp_joint", f"floats, `default`, {_JOINTLY}", "floats", (*_FROM_GPTQ, _JOINT), True, at=_SIX_AND_FOUR),
    Row("fp_unsigned", f"floats, `default`, {_UNSIGNED}", "floats", _FROM_GPTQ, True, unsigned=True, at=_SIX_AND_FOUR),
)
_AT_SIX = (
    Row("int_long", f"integers, AdaRound, {_FIRMLY}, {LONG} iterations", "integers", (*_FIRM, _LONG)),
    Row("int_best", "integers, balanced, `best`: 1000 iterations", "integers", _BEST, balance=True),
    Row("fp4dit_published", f"floats, FP4DiT's own loop, {LONG} iterations", "published", _LOOP, published_loop=LONG),
    Row("fp_from_gptq", "floats, GPTQ, then AdaRound", "floats", _FROM_GPTQ),
    Row("fp_best", "floats, `best`: 1000 iterations", "floats", _BEST, balance=True),
    Row("fp_exact", "floats, `default`, balanced by powers of two", "floats", _FROM_GPTQ, balance="exact"),
    Row("fp_weighted", "floats, `default`, steps weighted", "floats", (*_FROM_GPTQ, _WEIGHTED), balance=True),
    Row("fp_e1m2", "floats, `default`, E1M2 weights", "floats", _FROM_GPTQ, balance=True, weight="e1m2"),
    Row("fp_auto", "floats, `default`, formats chosen", "auto", _FROM_GPTQ, balance=True),
    Row("fp_qkv", "floats, `fast`, Q, K and V quantized per token and head", "floats", _GPTQ, True, _ATTENTION),
    Row("fp_hadamard", "floats, `fast`, `hadamard: 64` in `*.ff.net.2`", "floats", _GPTQ, True, _ROTATED),
    Row("fp_unsigned_fast", f"floats, `fast`, {_UNSIGNED}", "floats", _GPTQ, True, unsigned=True),
    Row("fp_low_rank_4", "floats, `fast`, `low_rank: 4`", "floats", _GPTQ, True, ((_ALL, "low_rank: 4"),)),
    Row("fp_low_rank_16", "floats, `fast`, `low_rank: 16`", "floats", _GPTQ, True, ((_ALL, "low_rank: 16"),)),
)


def with_zero_point(row: Row) -> Row:
    """The same of integers, whose activations have a zero point per token."""
    title = row.title.replace("integers", "integers with zero points")
    return replace(row, key=f"{row.key}_zero", title=title, zero_points=True)


INTEGERS = (*_INTEGERS, *map(with_zero_point, _INTEGERS))
"""What floats are held against, at all widths."""

ROWS = (*INTEGERS, *_FLOATS, *_VARIANTS, *(replace(row, at=(W4A6,)) for row in _AT_SIX))


def row_of(key: str) -> Row:
    """The row with this key."""
    return next(row for row in ROWS if row.key == key)


OURS = row_of("ours")
