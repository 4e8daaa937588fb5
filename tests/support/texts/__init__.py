"""What models read and write: tokenizers, templates, calls, histories as clients send them."""
