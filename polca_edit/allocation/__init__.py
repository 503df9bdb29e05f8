"""How much of each token's loss change each basis vector accounts for, and where that is measured."""
