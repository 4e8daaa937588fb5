"""The endpoints of OpenAI's API: parse, hand over, shape the reply."""
