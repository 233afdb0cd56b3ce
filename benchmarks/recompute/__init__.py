"""What computing activations twice saves and costs."""
