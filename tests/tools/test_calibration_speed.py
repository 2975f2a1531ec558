"""What the race against the published calibration says of its runs."""

from __future__ import annotations

from tools.calibration_speed import Run, table, verdict

SHORT, LONG = (
    Run("published", 100.0, (2e-4, 1e-4), 250),
    Run("published", 1e3, (1e-4, 1e-5), 2500),
)


def test_only_what_is_as_good_in_every_block_counts() -> None:
    quick, good = Run("quick", 1.0, (1e-4, 1.1e-4)), Run("good", 10.0, (2e-4, 1e-5))
    assert verdict(SHORT, [quick, good]).startswith("Met: 5 × the speed of 250 iterations")
    assert "good, 10.0 × as fast" in verdict(SHORT, [quick, good])
    assert verdict(SHORT, [quick, Run("slow", 21.0, (0.0, 0.0))]).startswith("**Missed**: 5 ×")
    assert verdict(SHORT, [quick]).startswith("**Missed**: none of ours has the error of 250 iterations")
    assert verdict(LONG, [quick, good]).startswith("**Missed**: none of ours has the error of 2500 iterations")


def test_the_table_has_every_run_against_every_published_one() -> None:
    text = table([SHORT, LONG], [Run("good", 10.0, (2e-4, 1e-5))])
    assert "| good | 10 | 2.00e-04 | 1.00e-05 | 10.0 | 100.0 |" in text
    heading, rule = text.splitlines()[2:4]
    assert heading.endswith("| 250 iterations ÷ its time | 2500 iterations ÷ its time |")
    assert heading.count("|") == rule.count("|")
    assert "PyTorch" in text
