"""From text to token sets: documents, windows, features, gold tags."""
