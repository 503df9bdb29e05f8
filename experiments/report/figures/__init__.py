"""Every figure of the page and of the studies, one module per subject."""
