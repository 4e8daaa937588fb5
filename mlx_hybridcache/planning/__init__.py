"""What a model weighs before it is loaded, and what fits into a machine."""
