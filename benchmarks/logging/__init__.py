"""What the local metrics cost in a step."""
