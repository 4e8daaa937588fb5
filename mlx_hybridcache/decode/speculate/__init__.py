"""Speculation: tokens that are drafted cheaply, and verified many at a time by one forward of the model."""
