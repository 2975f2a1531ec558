"""What all GPU kernels share: how one is described, compiled ahead of time, kept in files and launched."""
