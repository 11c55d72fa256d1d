"""Products with packed weights in Triton, for GPUs since compute capability 8.0."""
