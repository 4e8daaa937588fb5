"""`bench kills`: writers and servers that are killed, and what their cache directory must still hold."""
