"""LiteLLM, streamed, its chunks put together by its own builder."""

import litellm
from task import MODEL, QUESTIONS, SYSTEM, TOOLS, URL, call, tell

litellm.telemetry = False
messages: list = [{"role": "system", "content": SYSTEM}]
replies, cached = [], []


def step(tool_choice):
    chunks = litellm.completion(
        model=f"openai/{MODEL}",
        api_base=URL,
        api_key="none",
        messages=messages,
        tools=TOOLS,
        tool_choice=tool_choice,
        stream=True,
        stream_options={"include_usage": True},
        num_retries=0,
    )
    reply = litellm.stream_chunk_builder(list(chunks), messages=messages)
    cached.append(reply.usage.prompt_tokens_details.cached_tokens)
    message = reply.choices[0].message
    messages.append(message)
    return message


for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    for wanted in step("required").tool_calls:
        found = call(wanted.function.name, wanted.function.arguments)
        messages.append({"role": "tool", "tool_call_id": wanted.id, "content": found})
    replies.append(step("auto").content)
tell(replies, cached)
