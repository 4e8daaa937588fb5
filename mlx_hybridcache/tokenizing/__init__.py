"""From text to token ids, of which none is made twice."""
