"""What a run is about: model, data, loss and groups of tokens."""
