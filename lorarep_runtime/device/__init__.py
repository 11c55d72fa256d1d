"""The device: its memory, copies to it, times of its work, and the threads that drive it."""
