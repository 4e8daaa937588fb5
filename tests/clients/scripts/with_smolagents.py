"""smolagents' agent that calls tools, its history going on from run to run."""

from smolagents import OpenAIModel, ToolCallingAgent, tool
from task import FUNCTIONS, MODEL, QUESTIONS, URL, tell

model = OpenAIModel(model_id=MODEL, api_base=URL, api_key="none", max_tokens=200)
agent = ToolCallingAgent(
    tools=[tool(function) for function in FUNCTIONS.values()],
    model=model,
    verbosity_level=0,
)
replies: list = []
for question in QUESTIONS:
    # One step of a run that is not asked to end: the small model has not learnt `final_answer`.
    for step in agent.run(question, reset=False, stream=True, max_steps=1):
        if type(step).__name__ == "ActionStep":
            replies.append(step.observations)
            break
tell(replies, None)
