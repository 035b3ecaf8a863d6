"""Vocabulary-parallel choice of the next token."""
