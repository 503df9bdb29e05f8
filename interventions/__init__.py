"""Action: undo, reverse or transplant movement along basis vectors, and judge what it does."""
