"""What clients of llama.cpp's server look for before they ask for a reply."""
