"""Calls of tools: how they are read from a model's text, and how a text is kept to them."""
