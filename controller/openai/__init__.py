"""The OpenAI-compatible HTTP front: the same service for programs that speak that protocol."""
