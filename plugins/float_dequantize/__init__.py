"""From grid values, or from weight codes, back to real numbers."""
