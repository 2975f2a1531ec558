"""What runs on the device that an engine is for: `fp4export build` and `fp4export doctor`.

Imports the standard library, numpy, onnx (with ml_dtypes) and, inside functions, tensorrt and polygraphy: nothing else.
"""
