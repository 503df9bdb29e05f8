"""Pages, tables and figures drawn from records; never from a model."""
