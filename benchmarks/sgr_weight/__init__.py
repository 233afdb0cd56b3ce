"""Which weight for SGR."""
