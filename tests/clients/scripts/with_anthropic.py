"""Anthropic's own client: the functions' loop written by hand, streamed."""

import anthropic
from task import FUNCTIONS, MODEL, QUESTIONS, SYSTEM, TOOLS, URL, tell

client = anthropic.Anthropic(base_url=URL.removesuffix("/v1"), api_key="none", max_retries=0)
declared = [each["function"] for each in TOOLS]
tools: list = [
    {"name": f["name"], "description": f["description"], "input_schema": f["parameters"]}
    for f in declared
]
messages: list = []
replies, cached = [], []


def step(tool_choice):
    with client.messages.stream(
        model=MODEL,
        max_tokens=200,
        system=SYSTEM,
        messages=messages,
        tools=tools,
        tool_choice={"type": tool_choice},
    ) as stream:
        for _ in stream:
            pass
        reply = stream.get_final_message()
    usage = reply.usage
    cached.append(usage.cache_read_input_tokens)
    messages.append({"role": "assistant", "content": [each.to_dict() for each in reply.content]})
    return reply.content


for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    results = [
        {
            "type": "tool_result",
            "tool_use_id": wanted.id,
            "content": FUNCTIONS[wanted.name](**wanted.input),
        }
        for wanted in step("any")
        if wanted.type == "tool_use"
    ]
    messages.append({"role": "user", "content": results})
    replies.append("".join(block.text for block in step("auto") if block.type == "text"))
tell(replies, cached)
