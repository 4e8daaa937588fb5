"""Pydantic AI without any tool: what it takes for a call, it answers with a request of its own."""

from pydantic_ai import Agent
from pydantic_ai.messages import ModelResponse
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from task import LONG_SYSTEM, MODEL, QUESTIONS, URL, tell

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=URL, api_key="none"))
agent = Agent(model, instructions=LONG_SYSTEM)
history: list = []
replies = []
for question in QUESTIONS:
    result = agent.run_sync(question, message_history=history)
    history = result.all_messages()
    replies.append(result.output)
steps = [message for message in history if isinstance(message, ModelResponse)]
tell(replies, [step.usage.cache_read_tokens for step in steps])
