"""OpenAI's agents over chat completions, a run for each question."""

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from task import FUNCTIONS, MODEL, QUESTIONS, SYSTEM, URL, tell

set_tracing_disabled(disabled=True)
client = openai.AsyncOpenAI(base_url=URL, api_key="none", max_retries=0)
agent = Agent(
    name="assistant",
    instructions=SYSTEM,
    model=OpenAIChatCompletionsModel(MODEL, client),
    # It asks for `auto` by itself once something was called.
    model_settings=ModelSettings(tool_choice="required"),
    tools=[function_tool(function) for function in FUNCTIONS.values()],
)
messages: list = []
replies, cached = [], []
for question in QUESTIONS:
    result = Runner.run_sync(agent, [*messages, {"role": "user", "content": question}])
    messages = result.to_input_list()
    replies.append(result.final_output)
    cached += [r.usage.input_tokens_details.cached_tokens for r in result.raw_responses]
tell(replies, cached)
