"""Changes of the model before it is quantized that cost something at inference and make quantization lose less."""
