"""Bodies of the stages of a run: what each computes from the records of those before it."""
