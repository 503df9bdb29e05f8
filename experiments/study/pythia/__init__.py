"""What Pythia shapes cost: pieces of work, whole runs, and the plan beside them."""
