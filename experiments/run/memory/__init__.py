"""Memory of a run: its budget, and what becomes of freed blocks."""
