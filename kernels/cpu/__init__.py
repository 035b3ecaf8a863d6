"""The CPU backend: torch operators, used in the way that is fast on CPUs."""
