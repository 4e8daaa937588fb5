"""Models with something of their own: in their caches, their batches, their experts, their weights."""
