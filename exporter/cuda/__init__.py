"""Quantized linears in PyTorch on a GPU, by this project's kernels. None of it has run on a GPU yet."""
