"""Models that are too large to test with, and plans of them."""
