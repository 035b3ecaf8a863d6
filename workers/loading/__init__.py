"""Streaming a rank's slices of a checkpoint into its layers."""
