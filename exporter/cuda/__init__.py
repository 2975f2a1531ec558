"""This project's kernels in PyTorch on a GPU: quantized linears, and error feedback while weights are calibrated."""
