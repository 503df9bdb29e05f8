"""Verbs of the command line. Models are imported when a verb runs, so that ``--help`` answers at once."""
