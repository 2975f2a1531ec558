"""Online activation quantization of one token at a time, to numbers of a container."""
