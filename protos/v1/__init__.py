"""Protocol buffers of `phalanx.v1` and the code generated from them."""
