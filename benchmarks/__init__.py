"""Ratios against other libraries, simpler methods and the floor; nothing imports this package."""
