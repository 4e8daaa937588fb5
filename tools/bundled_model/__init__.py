"""How the bundled model was made: its text, its tokenizer, its training and its card."""
