"""Passes for TensorRT engines whose quantized linears are plugins: what is fused into their kernels."""
