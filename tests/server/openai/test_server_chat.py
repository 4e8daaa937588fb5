"""From messages to prompt tokens, with the bundled model's own template."""

from dataclasses import replace

import pytest
from bundled import chat, load
from mlx_hybridcache_server.errors import ApiError
from mlx_hybridcache_server.prompts.chat import Rendered, Renderer
from mlx_hybridcache_server.schema.requests import ChatBody, Conversation
from mlx_hybridcache_server.schema.tool_choice import callable_tools
from mlx_lm.tokenizer_utils import TokenizerWrapper
from transformers import AutoTokenizer

from mlx_hybridcache.demo import BUNDLED_MODEL
from mlx_hybridcache.tokenizing.turn_marks import learn_turn_marks

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("get_weather", "send_mail")
]


class AtOnce:
    """A renderer whose steps are all taken at once."""

    def __init__(self, *args):
        self._renderer = Renderer(*args)

    def __getattr__(self, name):
        return lambda *args, **kwargs: done(getattr(self._renderer, name)(*args, **kwargs))


def renderer(**template_args):
    """A renderer of the bundled model."""
    _, tokenizer = load()
    return AtOnce(tokenizer, learn_turn_marks(tokenizer), 3072, template_args)


def done(steps):
    """What comes of steps that are all taken here."""
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return with_list(end.value)


def with_list(made):
    """The same with its tokens as a list, which compares as a whole."""
    if isinstance(made, Rendered):
        return replace(made, tokens=made.tokens.tolist())
    return made.tolist()


def text(rendered):
    """What was rendered, as text."""
    _, tokenizer = load()
    return tokenizer.decode(rendered.tokens)


def body(*messages, **fields):
    """A chat request of (role, content) pairs or whole messages."""
    made = [m if isinstance(m, dict) else {"role": m[0], "content": m[1]} for m in messages]
    return ChatBody(messages=made, **fields)


USER = ("user", "Hello")


def test_a_conversation_is_rendered_as_the_template_says():
    """The same tokens as the tokenizer's own call gives."""
    assert renderer().chat(body(("system", "Be brief."), USER)).tokens == chat(
        ("system", "Be brief."), USER
    )


def test_content_may_come_in_parts_and_from_a_developer():
    """Text parts are joined; OpenAI's developer is the template's system."""
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    made = body(("developer", "Be brief."), {"role": "user", "content": parts})
    assert renderer().chat(made).tokens == chat(("system", "Be brief."), USER)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_what_is_not_text_is_refused_with_a_sentence(kind):
    """And nothing is fetched."""
    part = {"type": kind, kind: {"url": "http://localhost:1/x.png"}}
    with pytest.raises(ApiError) as refused:
        renderer().chat(body({"role": "user", "content": [part]}))
    assert refused.value.status_code == 400
    assert kind in refused.value.detail


def test_past_reasoning_is_read_under_both_names():
    """In the turns behind the last question, where the template keeps it."""
    call = {"function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    for name in ("reasoning", "reasoning_content"):
        said = {"role": "assistant", "content": None, name: "hm", "tool_calls": [call]}
        rendered = text(renderer().chat(body(USER, said, ("tool", "4 degrees"))))
        assert "<think>\nhm\n</think>" in rendered
        assert '{"name": "get_weather", "arguments": {"city": "Oslo"}}' in rendered


def test_arguments_that_are_not_json_stay_as_text():
    """A reply that a client sends back cannot make its conversation unreadable."""
    call = {"function": {"name": "f", "arguments": "{broken"}}
    said = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert "{broken" in text(renderer().chat(body(USER, said, ("tool", "no"))))


def test_template_arguments_of_the_request_win():
    """enable_thinking: the server's default, the request's own."""
    off = text(renderer(enable_thinking=False).chat(body(USER)))
    on = text(
        renderer(enable_thinking=False).chat(
            body(USER, chat_template_kwargs={"enable_thinking": True})
        )
    )
    assert off.endswith("</think>\n\n")
    assert not on.endswith("</think>\n\n")


@pytest.mark.parametrize("name", ["tokenize", "messages", "tools", "add_generation_prompt"])
def test_template_arguments_cannot_change_how_a_prompt_is_made(name):
    """They are for the template, not for the tokenizer."""
    with pytest.raises(ApiError, match=name):
        renderer().chat(body(USER, chat_template_kwargs={name: False}))


def test_a_template_that_fails_is_the_requests_error():
    """400 with the template's own words."""
    tokenizer = TokenizerWrapper(AutoTokenizer.from_pretrained(BUNDLED_MODEL))
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    failing = AtOnce(tokenizer, learn_turn_marks(None), 3072, {})
    with pytest.raises(ApiError, match="roles must alternate"):
        failing.chat(body(USER))


def test_without_a_template_roles_are_written_out():
    """As mlx_lm.server does, with the request's own words if it brings some."""
    tokenizer = TokenizerWrapper(AutoTokenizer.from_pretrained(BUNDLED_MODEL))
    tokenizer.chat_template = None
    tokenizer.has_chat_template = False
    plain = AtOnce(tokenizer, learn_turn_marks(None), 3072, {})
    assert text(plain.chat(body(USER))) == "USER: Hello\nASSISTANT:"
    roles = {"user": "Q: ", "assistant": "A: ", "stop": "|"}
    assert text(plain.chat(body(USER, role_mapping=roles))) == "Q: Hello|A:"


def test_a_trailing_assistant_message_is_continued_when_asked():
    """No end of turn behind it; without asking, a new reply is opened."""
    made = body(USER, ("assistant", "I will"))
    assert text(renderer().chat(made, continues=True)).endswith("assistant\nI will")
    assert text(renderer().chat(made)).endswith("<|im_start|>assistant\n")
    with pytest.raises(ApiError, match="assistant message at the end"):
        renderer().chat(body(USER), continues=True)


def test_a_users_marker_does_not_open_reasoning():
    """`<think>` in a question says nothing about the reply."""
    assert renderer().chat(body(("user", "What is <think>?"))).state == "normal"
    made = body(USER, ("assistant", "<think>\nhm"))
    assert renderer().chat(made, continues=True).state == "reasoning"


def test_reasoning_may_begin_unless_the_template_has_closed_it():
    """Thinking on, off, and a model that reasons without being asked."""
    assert renderer().chat(body(USER)).may_reason
    assert not renderer(enable_thinking=False).chat(body(USER)).may_reason
    earlier = renderer().chat(body(("user", "What is </think>?"), ("assistant", "?"), USER))
    assert earlier.may_reason


ALLOWED = {"type": "function", "function": {"name": "send_mail"}}
CHOICES = {
    "auto": ["get_weather", "send_mail"],
    "required": ["get_weather", "send_mail"],
    "none": [],
    "named": ["send_mail"],
    "allowed": ["send_mail"],
}


def choice(name, mode="auto", tools=(ALLOWED,)):
    """A tool_choice."""
    allowed = {"mode": mode, "tools": list(tools)}
    objects = {"named": ALLOWED, "allowed": {"type": "allowed_tools", "allowed_tools": allowed}}
    return objects.get(name, name)


@pytest.mark.parametrize("name", CHOICES)
def test_tool_choice_leaves_the_prompt_as_it_is(name):
    """All tools stay in it; the choice says which of them the reply may call."""
    chosen = body(USER, tools=TOOLS, tool_choice=choice(name))
    assert renderer().chat(chosen) == renderer().chat(body(USER, tools=TOOLS))
    assert [tool["function"]["name"] for tool in callable_tools(chosen)] == CHOICES[name]


@pytest.mark.parametrize(
    ("chosen", "tools", "said"),
    [
        ("required", None, "no tools"),
        ("required", [], "no tools"),
        (choice("allowed", "required", []), TOOLS, "no tools"),
        (choice("named"), TOOLS[:1], "No tool is named send_mail"),
        (choice("allowed"), None, "No tool is named send_mail"),
    ],
)
def test_a_call_that_cannot_be_is_refused(chosen, tools, said):
    """No tools at all, or none of that name."""
    with pytest.raises(ApiError, match=said):
        callable_tools(body(USER, tools=tools, tool_choice=chosen))


def test_a_prefix_is_what_all_its_continuations_share():
    """The system turn and the next turn's opener, and nothing of either question."""
    prefix = renderer().prefix(
        Conversation(messages=[{"role": "system", "content": "Be brief."}], tools=TOOLS)
    )
    for question in ("Why?", "0 is a number", "about"):
        whole = renderer().chat(body(("system", "Be brief."), ("user", question), tools=TOOLS))
        assert whole.tokens[: len(prefix) - 1] == prefix[:-1]


def test_a_prefix_is_rendered_once_by_the_step_that_weighs_all_of_it(monkeypatch):
    """Several are asked for beside a prompt; behind the first step others weigh what a piece of text does."""
    _, tokenizer = load()
    rendered, whole = [], Renderer.chat

    def counted(*args, **kwargs):
        rendered.append(args)
        return whole(*args, **kwargs)

    monkeypatch.setattr(Renderer, "chat", counted)
    made = Renderer(tokenizer, learn_turn_marks(tokenizer), 2**31 - 1, {})
    steps = made.prefix(body(("system", "The lamp of Ada is red.\n" * 2000)))
    next(steps)
    assert len(rendered) == 1
    done(steps)
    assert len(rendered) == 1


def test_what_is_moved_is_no_part_of_a_prefix():
    """It stands behind what is said next: tomorrow's prefix is today's."""
    one, other = (
        renderer().prefix(
            Conversation(
                messages=[{"role": "system", "content": f"Be brief.\nToday is 2026-11-{day}."}],
                stable_prefix="move",
            )
        )
        for day in (28, 29)
    )
    assert one == other == renderer().prefix(body(("system", "Be brief.\n")))
