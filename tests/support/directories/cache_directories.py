"""A cache directory that a real run left, as `mlx-hybridcache cache` shows it."""

import json

import bundled
import numpy as np
import tiny

SYSTEM = bundled.text(900)
QUESTIONS = ("Who are you?", "Sing a song.", "What is a list?")
CHATS = [bundled.chat(("system", SYSTEM), ("user", question)) for question in QUESTIONS]
TEXT = list(bundled.text_tokens(2700))
BRANCHED = [*TEXT[:1500], *TEXT[:40]]
ROWS_ONLY = tiny.random_tokens(300, seed=5)
BUDGET = {"memory_budget": "256MB", "disk_budget": "256MB"}


def found_json(run, *words, **where):
    shown = run(*words, "--json", **where)
    assert (shown.status, shown.err) == (0, "")
    return json.loads(shown.out)


def of_model(run, model="qwen3_next", **where):
    every = found_json(run, "ls", **where)["namespaces"]
    return next((one for one in every if one["model"] == model), None)


def checkpoints(run, **where):
    """Position -> checkpoint, of the bundled model."""
    one = of_model(run, **where)
    places = [place for line in one["runs"] for place in line["checkpoints"]] if one else []
    return {place["position"]: place for place in places}


def id_at(run, position, **where):
    return checkpoints(run, **where)[position]["id"]


def files(root):
    return sorted(root.rglob("*.safetensors"))


def content(root):
    """Everything in a directory but the index, which a look may open."""
    return {
        path.relative_to(root): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith("index.sqlite")
    }


def shared_by_chats():
    first, second = (np.array(chat[: min(map(len, CHATS[:2]))]) for chat in CHATS[:2])
    return int(np.argmax(first != second))


def run_of(tokens):
    return np.array(tokens, np.int32).tobytes()
