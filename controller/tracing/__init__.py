"""Traces of requests, for OpenTelemetry; nothing of it is imported where nobody asked for them."""
