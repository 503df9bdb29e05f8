"""Discovery by intervention in a run: timeline, interventional clusters, skill axes, blocking."""
