"""Triton kernels of a decode step: rows of one new token each."""
