"""From a request that every protocol can be put into to its reply, before it takes a protocol's shape."""
