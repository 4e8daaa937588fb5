"""Who may use the one model that is there, who waits for it, and for how long it stays."""
