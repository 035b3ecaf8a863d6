"""Requests and prefixes on their way from one replica to another."""
