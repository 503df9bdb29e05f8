"""Bases of parameter space: the record, the ways to build one, rotations inside a span."""
