"""The model that is served, and the requests that run on it."""
