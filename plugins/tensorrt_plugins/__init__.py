"""The project's operators as TensorRT plugins whose kernels were compiled ahead of time."""
