"""Skills found by what undoing does to tokens."""
