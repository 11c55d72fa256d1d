"""A request's way from any protocol to the engine and back."""
