"""`bench router`: what canonicalizing a router does, on models whose experts are known to be alike or not."""
