"""Several processes: each method against its own bound, and against exact pipelines."""
