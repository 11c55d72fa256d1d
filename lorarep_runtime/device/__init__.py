"""The device: its memory, copies to it, times of its work, and the GIL for the threads that drive it."""
