"""Tanh-GELU and the online quantization of its result, in one kernel."""
