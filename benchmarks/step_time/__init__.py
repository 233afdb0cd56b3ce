"""What a training step takes, beside a loop written by hand."""
