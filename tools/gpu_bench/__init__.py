"""Times of the kernels on a GPU, beside those of torch's own products."""
