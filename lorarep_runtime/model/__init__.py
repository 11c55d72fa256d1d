"""The base model, and how plans walk its layers."""
