"""The cells of docs/quality.md: a row's method at some bits, calibrated with a seed."""
