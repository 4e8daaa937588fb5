"""Which paths are served, what is imported when one is first asked, and their description."""
