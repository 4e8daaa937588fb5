"""Cache directories: what earlier runs left in them, and what may happen to it."""
