"""Adapters, attention over pages and DoRA norms by torch's own operators, on any device."""
