"""Repositories of the Hugging Face Hub, as verified snapshots on this machine."""
