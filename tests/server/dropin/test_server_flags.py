"""mlx_lm.server's flags: there under their names, with their values, and with their effect."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import mlx_lm
import mlx_lm.server
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from servers import (
    CHAT,
    COMPLETIONS,
    OURS,
    THEIRS,
    running,
    user,
)
from serving.comparing import (
    disagreements,
)
from serving.parsers import flags_of, our_parser, their_parser

from mlx_hybridcache.demo import BUNDLED_MODEL


def test_every_flag_of_mlx_lm_server_is_there_under_its_name():
    """25 in 0.32.2, from --model to --pipeline."""
    theirs = flags_of(their_parser())
    assert len(theirs) >= 25
    assert theirs.keys() - flags_of(our_parser()).keys() == set()


SAMPLES = {int: ["7"], float: ["0.25", "1"], str: ["a-word"], json.loads: ['{"a": [1]}']}


def test_values_are_read_alike():
    """`--max-tokens 7` is 7 here and there, `--prompt-cache-bytes 3GB` the same bytes."""
    parsers = their_parser(), our_parser()
    for option, action in flags_of(parsers[0]).items():
        if action.nargs == 0:
            given = [[option]]
        elif option == "--allowed-origins":
            given = [[option, "http://a,http://b"]]  # a list there, a tuple here
        elif option == "--prompt-cache-bytes":
            given = [[option, size] for size in ("3GB", "10MB", "2G", "5M", "1000", "1.5GB")]
        else:
            values = action.choices or SAMPLES[action.type]
            given = [[option, str(value)] for value in values]
        for arguments in given:
            values = [
                vars(parser.parse_args(arguments))[flags_of(parser)[option].dest]
                for parser in parsers
            ]
            theirs, ours = (list(x) if isinstance(x, list | tuple) else x for x in values)
            assert theirs == ours, arguments


CONFIGURED = [
    *("--temp", "0.9", "--top-p", "0.95", "--top-k", "40", "--min-p", "0.005"),
    *("--max-tokens", "9", "--prefill-step-size", "64", "--log-level", "WARNING"),
    *("--chat-template-args", '{"enable_thinking": false}'),
    *("--decode-concurrency", "2", "--prompt-concurrency", "1", "--trust-remote-code"),
    *("--prompt-cache-size", "2", "--pipeline"),
]


@pytest.fixture(scope="module")
def configured():
    with running(THEIRS, *CONFIGURED) as theirs, running(OURS, *CONFIGURED) as ours:
        yield theirs, ours


def test_flags_set_the_defaults_of_requests_alike(configured):
    """Sampling, length and the template's arguments come from the flags, and the seed from the request."""
    for seed in (1, 2):
        body = {"model": "default_model", "messages": user("Hi, I am Otto."), "seed": seed}
        expected, reply = (server.answer(CHAT, **body) for server in configured)
        assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"
        assert reply["usage"]["completion_tokens"] <= 9


def test_a_flag_without_effect_says_so(configured):
    """--pipeline on one machine changes nothing, here with a line in the log."""
    _, ours = configured
    assert re.search("WARNING.*--pipeline", ours.log)


def test_a_request_wins_over_the_flags(configured):
    """Its temperature, its length, its template arguments."""
    body = {
        "model": "default_model",
        "messages": user("Hello, I am Felix."),
        "temperature": 0,
        "max_tokens": 12,
        "chat_template_kwargs": {"enable_thinking": True},
    }
    expected, reply = (server.answer(CHAT, **body) for server in configured)
    assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"
    assert reply["choices"][0]["message"]["reasoning"]
    assert reply["usage"]["completion_tokens"] == 12


def test_a_number_of_conversations_is_a_limit_when_it_is_given(configured):
    """--prompt-cache-size 2: of three conversations the first is forgotten."""
    _, ours = configured
    cached = []
    for _ in range(2):
        for name in ("Ada", "Ken", "Hedy"):
            body = {"prompt": f"{name} wrote this: {name * 30}", "max_tokens": 1}
            cached.append(ours.answer(COMPLETIONS, **body)["usage"]["prompt_tokens_details"])
    assert [told["cached_tokens"] for told in cached] == [0] * 6
    assert ours.answer(COMPLETIONS, **body)["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter for the bundled model, with random weights that change its replies."""
    model = mlx_lm.load(str(BUNDLED_MODEL))[0]
    settings = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, settings)
    mx.random.seed(1)
    weights = {
        name: mx.random.normal(array.shape) * 0.1
        for name, array in tree_flatten(model.parameters())
        if "lora" in name
    }
    assert weights
    folder = tmp_path_factory.mktemp("adapter")
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}!<|im_end|>\n{% endfor %}"
)


def test_adapters_templates_and_quantized_keys_and_values_agree(adapter, theirs):
    """--adapter-path, --chat-template, --kv-bits: the same replies, other than without them.

    Quantized from a token of the reply on: within a prompt mlx-lm begins where a slice ends.
    """
    flags = ["--model", str(BUNDLED_MODEL), "--adapter-path", str(adapter)]
    flags += ["--chat-template", TEMPLATE, "--kv-bits", "8", "--quantized-kv-start", "14"]
    body = {"model": "default_model", "messages": user("Hello, I am Linus."), "logprobs": True}
    body["max_tokens"] = 12
    with running(THEIRS, *flags) as one, running(OURS, *flags) as other:
        for _ in range(2):
            expected, reply = (server.answer(CHAT, **body) for server in (one, other))
            assert not list(disagreements(expected, reply)), f"{expected}\n{reply}"
        assert "quantized to 8 bits from position 14 on" in other.log
    plain = theirs.answer(CHAT, **body)
    assert plain["usage"]["prompt_tokens"] != reply["usage"]["prompt_tokens"]
