"""Rounding of a tensor to a format's grid and back to floats, in one operator: what a layer's output goes through."""
