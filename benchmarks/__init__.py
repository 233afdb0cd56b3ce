"""Programs behind the claims of the documentation: one folder per claim."""
