"""Loads of adapters while the server runs: by calls, and by the adapters file."""
