"""Adapters: small weights beside a model's own, which take turns while the model stays."""
