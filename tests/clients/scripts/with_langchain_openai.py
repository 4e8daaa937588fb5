"""LangChain's model class: tools bound to it, streamed, the chunks added up."""

from functools import reduce
from operator import add

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI
from task import FUNCTIONS, MODEL, QUESTIONS, SYSTEM, URL, tell

model = ChatOpenAI(
    model=MODEL, base_url=URL, api_key="none", max_retries=0, stream_usage=True, temperature=0
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
    for wanted in step("required").tool_calls:
        found = FUNCTIONS[wanted["name"]](**wanted["args"])
        messages.append(ToolMessage(found, tool_call_id=wanted["id"]))
    replies.append(step("auto").content)
tell(replies, cached)
