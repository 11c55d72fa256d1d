"""The arithmetic that walks need beyond `transformers`, each kernel beside its torch reference."""
