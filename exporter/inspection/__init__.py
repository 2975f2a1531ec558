"""Looking into a file: what is quantized how, what it weighs, and what the passes did."""
