"""Training runs whose truth comes from the data, each with a twin in which the answer must be no."""
