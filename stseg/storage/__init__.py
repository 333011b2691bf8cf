"""Files and records that are written atomically."""
