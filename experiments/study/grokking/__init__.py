"""A published claim about grokking, put to the test."""
