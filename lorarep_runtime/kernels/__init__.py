"""Arithmetic of a forward pass that `transformers` lacks: Triton and CUDA kernels, each with a reference in torch."""
