"""Activation quantizers with one scale per short group along K: NVFP4 and MXFP8."""
