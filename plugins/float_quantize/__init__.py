"""Activation quantizers: online per token, or with a given scale."""
