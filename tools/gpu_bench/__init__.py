"""Times of the kernels on a GPU, beside those of torch's own products. Not run on a GPU yet."""
