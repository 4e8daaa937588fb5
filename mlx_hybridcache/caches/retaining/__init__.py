"""Buffers of requests that have ended, in which the next turn goes on without a copy."""
