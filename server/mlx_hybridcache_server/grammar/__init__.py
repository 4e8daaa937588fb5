"""Replies that can only be what was asked for."""
