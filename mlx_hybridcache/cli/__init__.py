"""The command line: `mlx-hybridcache serve | demo | verify | plan | canonicalize | cache | bench`."""
