"""The project's own files: pages, sources, environments to run clients in."""
