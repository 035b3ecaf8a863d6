"""The vLLM engine's gRPC protocol: the same service for gateways that speak it."""
