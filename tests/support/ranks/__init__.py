"""Groups of ranks on this machine: processes that meet over MLX's ring backend."""
