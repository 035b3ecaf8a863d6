"""The hands: one process per rank, running the same step plan as its peers."""
