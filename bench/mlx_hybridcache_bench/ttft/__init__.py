"""`bench ttft`: the time to first token of any server that speaks OpenAI's API, and a report of it."""
