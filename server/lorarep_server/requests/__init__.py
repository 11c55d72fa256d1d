"""The path of a request from any protocol to the engine, and of its events back."""
