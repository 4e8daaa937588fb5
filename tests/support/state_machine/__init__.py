"""Both tiers under operations in any order: what is done, and what must hold after each."""
