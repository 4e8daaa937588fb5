"""`bench overhead`: what the cache costs, a file for each part."""
