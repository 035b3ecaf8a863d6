"""The gRPC service: requests in, streams of tokens and text out."""
