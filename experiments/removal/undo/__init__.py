"""The study of removal by undoing: cost of a removal against how long it lasts."""
