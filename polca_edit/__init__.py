"""Observation: what training did to each token, along which directions.

Shape legend used in every signature of the project:

- T checkpoints, K basis vectors, N parameters, M scored tokens
- S sequences, P scored-position slots per sequence, C clusters

Losses are in nats per token; times are in optimiser steps.
"""
