"""Reading a prompt: where it is cut, slice by slice, and who reads a shared beginning."""
