"""`bench speculate`: replies with drafts beside the same without."""
