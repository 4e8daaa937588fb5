"""What a client may send, in OpenAI's words and in other servers'."""
