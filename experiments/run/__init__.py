"""One driver and one store for everything that has a run directory."""
