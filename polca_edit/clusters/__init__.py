"""Clusters of trajectories, who is in them, what they are called, when they break through."""
