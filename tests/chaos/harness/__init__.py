"""Clusters that are harmed on purpose, what their clients saw, and whether that was right."""
