"""LangChain's model class for Anthropic's API: tools bound to it, streamed, the chunks added up."""

from functools import reduce
from operator import add

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from task import FUNCTIONS, MODEL, QUESTIONS, SYSTEM, URL, tell

model = ChatAnthropic(
    model=MODEL, base_url=URL.removesuffix("/v1"), api_key="none", max_retries=0, max_tokens=200
)
tools = list(FUNCTIONS.values())
messages: list = [SystemMessage(SYSTEM)]
replies, cached = [], []


def step(tool_choice):
    reply = reduce(add, model.bind_tools(tools, tool_choice=tool_choice).stream(messages))
    cached.append(reply.usage_metadata["input_token_details"]["cache_read"])
    messages.append(reply)
    return reply


for question in QUESTIONS:
    messages.append(HumanMessage(question))
    for wanted in step("any").tool_calls:
        found = FUNCTIONS[wanted["name"]](**wanted["args"])
        messages.append(ToolMessage(found, tool_call_id=wanted["id"]))
    replies.append(step("auto").text)
tell(replies, cached)
