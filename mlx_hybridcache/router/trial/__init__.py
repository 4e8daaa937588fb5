"""A patch on trial: the arms, the ways of reading, what differs, and the verdict."""
