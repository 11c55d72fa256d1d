"""Captured decode steps and sliced prompts on a GPU."""
