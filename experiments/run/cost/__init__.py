"""What a run would cost: counts, measured speeds, and the plan made of them."""
