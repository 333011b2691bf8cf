"""Durable runs of several steps."""
