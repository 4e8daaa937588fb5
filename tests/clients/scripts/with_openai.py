"""OpenAI's own client: the functions' loop written by hand, streamed."""

import openai
from task import MODEL, QUESTIONS, SYSTEM, TOOLS, URL, call, tell

client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
messages: list = [{"role": "system", "content": SYSTEM}]
replies, cached = [], []


def step(tool_choice):
    with client.chat.completions.stream(
        model=MODEL,
        messages=messages,
        tools=TOOLS,
        tool_choice=tool_choice,
        stream_options={"include_usage": True},
    ) as stream:
        for _ in stream:
            pass
        reply = stream.get_final_completion()
    cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    message = reply.choices[0].message
    messages.append(message.to_dict())
    return message


for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    for wanted in step("required").tool_calls:
        found = call(wanted.function.name, wanted.function.arguments)
        messages.append({"role": "tool", "tool_call_id": wanted.id, "content": found})
    replies.append(step("auto").content)
tell(replies, cached)
