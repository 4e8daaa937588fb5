"""Servers under requests: one client, one set of scenarios, one mixture of clients."""
