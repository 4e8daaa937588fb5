"""Going back in live caches over tokens that were read before they were known to be right."""
