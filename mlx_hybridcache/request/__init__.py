"""A request: what callers hand over, what was asked, what happened, and what they hold of it."""
