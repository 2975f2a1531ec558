"""What the race against the published calibration says of its runs."""

from __future__ import annotations

from tools.calibration_speed import Run, table, verdict

PUBLISHED = Run("published", 100.0, (2e-4, 1e-4))


def test_only_what_is_as_good_in_every_block_counts() -> None:
    quick, good = Run("quick", 1.0, (1e-4, 1.1e-4)), Run("good", 10.0, (2e-4, 1e-5))
    assert verdict([PUBLISHED, quick, good]).startswith("Met: 5 ×")
    assert "good, 10.0 × as fast" in verdict([PUBLISHED, quick, good])
    assert verdict([PUBLISHED, quick, Run("slow", 21.0, (0.0, 0.0))]).startswith("**Missed**: 5 ×")
    assert verdict([PUBLISHED, quick]).startswith("**Missed**: none of ours")


def test_the_table_has_every_run_and_says_what_measured_it() -> None:
    text = table([PUBLISHED, Run("good", 10.0, (2e-4, 1e-5))], 250)
    assert "| good | 10 | 2.00e-04 | 1.00e-05 | 10.0 |" in text
    assert "250 iterations a block" in text
    assert "PyTorch" in text
