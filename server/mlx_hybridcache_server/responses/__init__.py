"""The endpoints of OpenAI's Responses API: put into a chat, handed over, the reply shaped and kept."""
