"""`bench disk`: a restart with a cache directory, and what the directory costs, a file for each part."""
