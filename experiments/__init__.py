"""Runs: configs, pipelines, testbeds, figures and the command line."""
