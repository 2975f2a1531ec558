"""Layer normalization, its modulation and the online quantization of the result, in one kernel."""
