"""The commands of a cache directory: looking into it, letting things go, keeping and shipping them."""
