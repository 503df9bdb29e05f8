"""Landscapes whose every causal answer is known."""
