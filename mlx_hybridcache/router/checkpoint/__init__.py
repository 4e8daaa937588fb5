"""A patched checkpoint: where tensors lie in their files, copies with other rows, the report and the card."""
