"""OpenAI's own client over the Responses API: the functions' loop written by hand, streamed."""

import openai
from task import MODEL, QUESTIONS, SYSTEM, TOOLS, URL, call, tell

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
tools: list = [{"type": "function", **each["function"], "strict": False} for each in TOOLS]
items: list = []
replies, cached = [], []


def step(tool_choice):
    with client.responses.stream(
        model=MODEL, instructions=SYSTEM, input=items, tools=tools, tool_choice=tool_choice
    ) as stream:
        for _ in stream:
            pass
        reply = stream.get_final_response()
    cached.append(reply.usage.input_tokens_details.cached_tokens)
    items.extend(each.to_dict() for each in reply.output)
    return reply


for question in QUESTIONS:
    items.append({"role": "user", "content": question})
    for wanted in step("required").output:
        if wanted.type == "function_call":
            output = call(wanted.name, wanted.arguments)
            items.append(
                {"type": "function_call_output", "call_id": wanted.call_id, "output": output}
            )
    replies.append(step("auto").output_text)
tell(replies, cached)
