"""Text to tokens, and tokens back to text that can be streamed."""
