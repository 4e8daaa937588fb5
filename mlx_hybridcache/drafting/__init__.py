"""Who drafts a reply: what is stored, a draft model whose prompts are cached like any other's, or both."""
