"""Memory and time of every method."""
