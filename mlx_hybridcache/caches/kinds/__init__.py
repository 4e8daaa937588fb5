"""Layer kinds: which pasts a layer's cache can return to, one file per kind.

`adapt` decides which kind a cache is; nothing else names mlx-lm's cache classes.
"""
