"""Writing a reply: alone or in a batch, one token a turn."""
