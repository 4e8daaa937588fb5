"""Hostile concurrency: rounds of events, the clients in them, and the models that they ask."""
