"""One durable training stage of any method."""
