"""Triton kernels of a prefill pass: many rows of each sequence."""
