"""Chat templates: how published ones are built, and what is learnt of each."""
