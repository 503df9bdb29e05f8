"""Skill removal on recorded runs: verb, study, methods."""
