"""The tier of a running cache: which checkpoints are written behind requests, and how one comes up again."""
