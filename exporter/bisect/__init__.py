"""Where a graph leaves the reference: block, layer or the operators between layers, and whether FP32 helps there."""
