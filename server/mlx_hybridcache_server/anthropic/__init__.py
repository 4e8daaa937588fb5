"""The endpoints of Anthropic's Messages API: put into a chat, handed over, the reply shaped."""
