"""`bench policies`: tokens replayed by policy and budget, on traces, beside what others keep."""
