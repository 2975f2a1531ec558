"""The table of kernels in the documentation lists what the tool would compile."""

from __future__ import annotations

import re

from plugins.kernels.hardware import HARDWARE, hardware_of
from tools.kernel_table import END, OPERATORS, PAGE, START, described, with_table


def test_the_page_lists_every_tactic_of_the_operators_for_every_gpu() -> None:
    text = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    listed = re.findall(r"^\| `(\w+)` \| (sm_\w+) \| (\d+) \|", text, re.MULTILINE)
    expected = [
        (op_type, hardware_of(capability).architecture, spec.name.rpartition("_t")[2])
        for op_type, spec, capability in described(OPERATORS, tuple(HARDWARE))
    ]
    assert sorted(listed) == sorted(expected)


def test_a_new_table_replaces_the_old_one_alone() -> None:
    page = f"before\n{START}\nold\n{END}\nafter\n"
    assert with_table(page, "new") == f"before\n{START}\nnew\n{END}\nafter\n"
