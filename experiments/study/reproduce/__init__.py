"""The published tables beside ours."""
