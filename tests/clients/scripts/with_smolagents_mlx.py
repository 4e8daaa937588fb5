"""smolagents' model class for MLX, as it is and with our cache beneath it, in one process."""

import sys

from smolagents import MLXModel
from task import LONG_SYSTEM, QUESTIONS, tell

from mlx_hybridcache import HybridPromptCache

model = MLXModel(
    model_id=sys.argv[1],
    max_tokens=40,
    apply_chat_template_kwargs={"enable_thinking": False},
)


def said(role: str, text: str) -> dict:
    """A message as smolagents writes them."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def converse(done) -> list[str]:
    """The replies to all questions, each behind the others; `done` is called after each."""
    messages = [said("system", LONG_SYSTEM)]
    replies = []
    for question in QUESTIONS:
        messages.append(said("user", question))
        replies.append(model.generate(messages).content)
        messages.append(said("assistant", replies[-1]))
        done()
    return replies


alone = converse(lambda: None)
steps = []
with HybridPromptCache(model.model, model.tokenizer) as cache:
    model.stream_generate = lambda model, tokenizer, **asked: cache.stream_generate(**asked)

    def note() -> None:
        """What the cache did for the last reply."""
        report = cache.last_report
        steps.append([report.prompt_tokens, report.restored_tokens])

    through = converse(note)
tell({"alone": alone, "through": through}, steps)
