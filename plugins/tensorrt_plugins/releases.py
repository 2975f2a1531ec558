"""Which TensorRT can have the plugins; nothing else is imported, since `doctor` runs where onnx is missing, too."""

OLDEST_TENSORRT = (10, 9)
"""The first release with plugins that are compiled ahead of time; JetPack 6 has 10.3, which has none."""
