"""Long runs, and runs that are killed."""
