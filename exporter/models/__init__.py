"""Model families: reading a checkpoint, calling it, and what of it is quantized."""
