"""Protocol buffers of the Open Inference Protocol and the code generated from them."""
