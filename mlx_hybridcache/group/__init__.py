"""Several ranks, each with a part of one model: rank 0 decides and tells, the others do the same."""
