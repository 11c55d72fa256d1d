"""The engine of lorarep: replicated stacks and adapters over one quantized base. No gRPC here."""
