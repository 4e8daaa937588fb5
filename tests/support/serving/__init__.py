"""What a few tests of the server need: a browser, comparisons with mlx_lm.server, a server that stands in for one."""
