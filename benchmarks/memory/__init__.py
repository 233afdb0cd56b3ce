"""Peak memory of a training step: what a step on fake tensors predicts, and what fits measure."""
