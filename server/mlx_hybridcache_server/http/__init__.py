"""What stands before the routes: who may ask, how large, how long, and JSON on the wire."""
