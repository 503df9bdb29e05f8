"""Series of training checkpoints, from any kind of file."""
