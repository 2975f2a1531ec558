"""The low-bit linear layer: grid values times coded weights."""
