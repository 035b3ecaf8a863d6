"""Decode steps as CUDA graphs: recorded once for each batch size, replayed ever after."""
