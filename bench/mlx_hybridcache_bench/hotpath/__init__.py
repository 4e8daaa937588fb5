"""`bench hotpath`: what a server itself costs where the model costs next to nothing."""
