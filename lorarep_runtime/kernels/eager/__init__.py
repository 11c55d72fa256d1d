"""The same arithmetic by torch's own operators, on any device."""
