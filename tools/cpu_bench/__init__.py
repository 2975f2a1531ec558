"""PixArt-α's transformer at its real size in ONNX Runtime on a CPU: graphs, measurements, page."""
