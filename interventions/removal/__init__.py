"""Edits that take one skill out, and what people use today instead."""
