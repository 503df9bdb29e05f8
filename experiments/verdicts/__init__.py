"""The causal test on recorded runs: which pairs, one plan, one table over runs."""
