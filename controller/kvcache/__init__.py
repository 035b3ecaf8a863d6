"""Who owns which block of the paged KV pool."""
