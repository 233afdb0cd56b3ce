"""Example programs: ordinary Lightning code that local learning is applied to from outside."""
