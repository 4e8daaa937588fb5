"""What is worth least now: pure functions over numbers, and the figures they are given."""
