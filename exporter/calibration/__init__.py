"""Calibration: inputs captured on sampler trajectories, scales, and learned rounding."""
