"""What each client is asked, the functions it may call, and how it tells what came of that."""

import json
import sys
from typing import Literal

URL = f"{sys.argv[1]}/v1"
MODEL = "default_model"
SYSTEM = "You are a helpful assistant."
LONG_SYSTEM = "\n".join(
    [
        SYSTEM,
        *(
            f"- The {thing} of Ada is red."
            for thing in ["lamp", "chair", "table", "kettle", "rope"]
        ),
    ]
)
"""For prompts that declare no functions: below 64 tokens a checkpoint is not worth its while."""

QUESTIONS = ["Where is Omar?", "What time is it in Oslo?", "Where is Lena?"]

calls: list[list] = []


def find_person(person: Literal["Omar", "Lena"]) -> str:
    """Where a person is.

    Args:
        person: The person's name
    """
    calls.append(["find_person", {"person": person}])
    return json.dumps({"room": "kitchen"})


def get_time(city: Literal["Oslo", "Lima"]) -> str:
    """Local time in a city.

    Args:
        city: The city's name
    """
    calls.append(["get_time", {"city": city}])
    return json.dumps({"hour": "10:15"})


FUNCTIONS = {"find_person": find_person, "get_time": get_time}


def _tool(name: str, argument: str, *values: str) -> dict:
    schema = {
        "type": "object",
        "properties": {argument: {"type": "string", "enum": values}},
        "required": [argument],
    }
    described = {"name": name, "description": FUNCTIONS[name].__doc__.splitlines()[0]}
    return {"type": "function", "function": {**described, "parameters": schema}}


TOOLS = [_tool("find_person", "person", "Omar", "Lena"), _tool("get_time", "city", "Oslo", "Lima")]


def call(name: str, arguments: str) -> str:
    """What the function says; the arguments as JSON, as they travel."""
    return FUNCTIONS[name](**json.loads(arguments))


def tell(replies: object, cached: list | None) -> None:
    """The client's account: what was called, what was replied, and the cached tokens of which it was told."""
    print(json.dumps({"calls": calls, "replies": replies, "cached": cached}))
