"""CUDA C++ kernels for Hopper GPUs (sm_90a), compiled by NVRTC."""
