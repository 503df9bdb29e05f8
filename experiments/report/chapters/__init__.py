"""Chapters of the page: one per basis, causal verdicts, discovery."""
