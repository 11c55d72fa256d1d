"""The engine: it takes requests, schedules their sequences, computes their tokens and sends them back."""
