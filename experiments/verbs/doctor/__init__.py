"""Verb ``doctor``: what a folder of checkpoints holds, and whether it is read rightly."""
