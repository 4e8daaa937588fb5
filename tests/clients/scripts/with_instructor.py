"""Instructor: validated objects, once by a function's call and once by a schema."""

from typing import Literal

import instructor
import openai
from pydantic import BaseModel
from task import LONG_SYSTEM, MODEL, QUESTIONS, URL, tell


class Asked(BaseModel):
    """What the question is about."""

    name: Literal["Omar", "Oslo", "Lena"]
    is_person: bool


client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)
replies, cached = [], []
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
    asking = instructor.from_openai(client, mode=mode)
    messages: list = [{"role": "system", "content": LONG_SYSTEM}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        asked, reply = asking.chat.completions.create_with_completion(
            model=MODEL, messages=messages, response_model=Asked, max_retries=0, max_tokens=200
        )
        replies.append(asked.model_dump())
        cached.append(reply.usage.prompt_tokens_details.cached_tokens)
        messages.append({"role": "assistant", "content": asked.model_dump_json()})
tell(replies, cached)
