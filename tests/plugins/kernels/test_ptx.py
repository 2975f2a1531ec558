"""PTX as text: a kernel's name, its arguments, what ptxas prints."""

from __future__ import annotations

import re

import pytest

from plugins.kernels.ptx import NAME, PtxError, Resources, finish, parse_resources

PTX = """
.version 8.5
.target sm_90a
	// .globl	old                     // -- Begin function old
.visible .entry old(
	.param .u64 .ptr .global .align 1 old_param_0,
	.param .u32 old_param_1,
	.param .u64 .ptr .global .align 1 old_param_2,
	.param .u64 .ptr .global .align 1 old_param_3
)
.reqntid 64
{
	ld.param.b64 	%rd4, [old_param_0];
	ld.param.b32 	%r3, [old_param_1];
	mov.b32 	%older_3, 0;
	ret;
}
"""
LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 8 bytes cumulative stack size
"""


def test_the_kernel_is_renamed_and_its_scratch_pointers_go() -> None:
    finished = finish(PTX, "new", parameters=2, threads=64)
    assert not re.search(r"\bold(_param_\d+)?\b", finished)
    assert "%older_3" in finished
    assert re.findall(r"\.param \S+ .*?(\w+),?\n", finished) == ["new_param_0", "new_param_1"]
    before, _, _ = PTX.replace("old", "new").partition(",\n\t.param .u64 .ptr .global .align 1 new_param_2")
    assert finished.startswith(before)
    assert finished.partition(")")[2].replace("new", "old") == PTX.partition(")")[2].replace("%newer", "%older")


@pytest.mark.parametrize("parameter", [2, 3])
def test_scratch_that_is_read_stays_no_secret(parameter: int) -> None:
    reading = PTX.replace("\tret;", f"\tld.param.b64 \t%rd5, [old_param_{parameter}];\n\tret;")
    with pytest.raises(PtxError, match=f"the code reads the scratch pointer new_param_{parameter}"):
        finish(reading, "new", parameters=2, threads=64)


@pytest.mark.parametrize(
    ("ptx", "parameters", "threads", "message"),
    [
        (PTX, 3, 64, "4 parameters with the two scratch pointers, not 5"),
        (PTX, 1, 64, "4 parameters with the two scratch pointers, not 3"),
        (PTX, 2, 128, r"compiled for \[64\] threads, to be launched with 128"),
        (PTX.replace(".u64 .ptr .global .align 1 old_param_3", ".u32 old_param_3"), 2, 64, "is no scratch pointer"),
        (PTX + PTX, 2, 64, "one entry was expected, 2 found"),
        ("", 2, 64, "one entry was expected, 0 found"),
    ],
)
def test_ptx_that_is_not_as_described_is_refused(ptx: str, parameters: int, threads: int, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        finish(ptx, "new", parameters, threads)


def test_what_ptxas_counts() -> None:
    assert parse_resources(LOG) == Resources(registers=168, stack_bytes=8, spill_store_bytes=16, spill_load_bytes=32)
    with pytest.raises(PtxError, match="one line about the stack was expected, 0 found"):
        parse_resources("ptxas info    : 0 bytes gmem")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", "a b", "1a", "é", "a" * 201, "a\n"])
def test_names_that_are_no_identifiers(name: str) -> None:
    assert not NAME.fullmatch(name)
