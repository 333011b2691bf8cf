"""Atomic writes of files and records."""
