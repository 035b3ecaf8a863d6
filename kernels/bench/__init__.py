"""How fast a backend's kernels are, as a share of what the device itself reaches."""
