"""What fp4export's numbers and operators mean: formats, packing, containers, and one room per operator.

Importing this package loads neither torch, TensorRT nor Triton: a machine that only builds or runs an engine
needs nothing else.
"""
