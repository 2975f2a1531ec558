"""The low-bit linear layer as one GPU kernel: quantized activations times weights that stay packed in memory."""
