"""Arithmetic about how long a step takes at least, and what fits a machine's memory."""
