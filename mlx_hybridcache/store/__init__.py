"""What is kept: the tree, its budget, and what goes first. Numbers and tokens, generic in what rows and states are."""
