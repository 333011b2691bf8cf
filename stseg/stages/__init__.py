"""A durable run of several steps."""
