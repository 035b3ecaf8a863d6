"""The muscle: torch tensors in, torch tensors out."""
