"""What goes into a store without a model, and what must come of it."""
