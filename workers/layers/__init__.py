"""Layers that know their own cut of the weights."""
