"""Placing, starting and watching the ranks of a replica."""
