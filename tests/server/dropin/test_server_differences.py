"""What differs on purpose in what a server does: requests, prompts, limits and models."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from servers import (
    CHAT,
    COMPLETIONS,
    INSTANT,
    OURS,
    PATIENCE_SECONDS,
    THEIRS,
    Server,
    Stream,
    command,
    environment,
    raw_exchange,
    raw_post,
    raw_status,
    read_stream,
    run_to_its_end,
    user,
)
from serving.differences import difference, rows_of, survives
from serving.parsers import their_parser

from mlx_hybridcache.demo import BUNDLED_MODEL

FATAL: dict[str, tuple[str, dict[str, Any]]] = {
    "stop: 5": (CHAT, {"messages": user("Hello, I am Ada."), "stop": 5}),
    'prompt: ""': (COMPLETIONS, {"prompt": "", "max_tokens": 2}),
    "logit_bias": (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "logit_bias": {"99999999": 1}}),
    "seed: -1": (COMPLETIONS, {"prompt": "a", "max_tokens": 2, "seed": -1}),
}


@difference(
    "Requests that end the server",
    theirs='Ended by `stop: 5`, `prompt: ""` or `logit_bias` beyond the vocabulary; `seed: -1` drops the connection',
    ours="Answers them, or refuses them with 400",
)
def fatal_requests(theirs: Server, ours: Server) -> None:
    theirs.kill()  # whether some of them end it depends on what was served before
    for path, body in FATAL.values():
        theirs.revive()
        assert not survives(theirs, path, **body), body
        assert survives(ours, path, **body), body


@difference(
    "A prompt that is the beginning of an earlier one",
    theirs="May end the server",
    ours="Answered from the cache",
)
def beginning_of_an_earlier_prompt(theirs: Server, ours: Server) -> None:
    said = " ".join(f"The oven of number {i} is white." for i in range(40))
    asked = {"messages": user(said), "max_tokens": 4}
    for server in (theirs, ours):
        server.answer(CHAT, **asked, **INSTANT)
    assert not survives(theirs, CHAT, **asked)
    reply = ours.answer(CHAT, **asked)
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@difference(
    "A changed ending, or a prompt made shorter",
    theirs="Everything behind the system message is read again",
    ours="Only the tokens behind the nearest checkpoint are read again",
)
def changed_ending(theirs: Server, ours: Server) -> None:
    text = " ".join(f"line {i} says {i * i}," for i in range(120))
    cached = []
    for server in (theirs, ours):
        server.answer(COMPLETIONS, prompt=f"{text} and so it begins.", max_tokens=2)
        reply = server.answer(COMPLETIONS, prompt=f"{text} but it ends.", max_tokens=2)
        cached.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0
    assert cached[1] >= 0.8 * reply["usage"]["prompt_tokens"]


@difference(
    "Stored conversations (`--prompt-cache-size`)",
    theirs="The last 10",
    ours="As many as fit into the memory budget, unless the flag is given; 0 turns the cache off",
    flag="--prompt-cache-size",
)
def twelve_conversations(theirs: Server, ours: Server) -> None:
    cached = []
    for server in (theirs, ours):
        for _ in range(2):
            replies = [
                server.answer(COMPLETIONS, prompt=f"{name} said {name}, {name}!", max_tokens=1)
                for name in map(chr, range(65, 77))
            ]
        cached.append([r["usage"]["prompt_tokens_details"]["cached_tokens"] for r in replies])
    assert sum(cached[0]) == 0
    assert all(cached[1])


@difference(
    "`max_tokens` not sent (`--max-tokens`)",
    theirs="512 tokens",
    ours="As many as fit into the model's context and the memory, unless the flag is given",
    flag="--max-tokens",
)
def replies_of_no_named_length(theirs: Server, ours: Server) -> None:
    body = {"prompt": "The", "logit_bias": {"700": 100}}
    assert theirs.answer(COMPLETIONS, **body)["usage"]["completion_tokens"] == 512
    stream = Stream(0, {})
    with ours.client.stream("POST", COMPLETIONS, json={**body, "stream": True}) as response:
        for _ in read_stream(response.iter_lines(), stream):
            if len(stream.events) > 600:  # it would go on for the whole context
                break
    assert all(choice["finish_reason"] is None for choice in stream.choices)


@difference(
    "The address itself, in a browser",
    theirs="404",
    ours="The [page](page.md) of the cache",
)
def the_page(theirs: Server, ours: Server) -> None:
    found = [server.client.get("/") for server in (theirs, ours)]
    assert [each.status_code for each in found] == [404, 200]
    assert found[1].headers["content-type"].startswith("text/html")


@difference(
    "The model when `--model` is not given",
    theirs="None until a request names one",
    ours="The bundled one",
)
def default_model(theirs: Server, ours: Server) -> None:
    assert their_parser().parse_args([]).model is None
    assert "--model" not in command(OURS, *ours.flags)
    (served,) = ours.client.get("/v1/models").json()["data"]
    assert served["id"]


@difference(
    "While the model is loaded",
    theirs="Listens; requests wait for it. Where it cannot be loaded, `/health` is 503 and requests get 404",
    ours="Holds the port, and listens once it can answer. Where it cannot be loaded: a sentence, and exit status 2",
)
def loading(theirs: Server, ours: Server) -> None:
    missing = ["--model", str(BUNDLED_MODEL / "nothing")]
    broken = Server(THEIRS, *missing)
    process = subprocess.Popen(
        command(THEIRS, "--port", str(broken.port), *missing),
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while (status := health_of(broken)) != 503:
            assert time.monotonic() < until, status
            time.sleep(0.05)
        assert broken.post(COMPLETIONS, prompt="a", max_tokens=1).status_code == 404
    finally:
        process.kill()
        process.wait()
        broken.close()
    assert run_to_its_end(*missing).returncode == 2


def health_of(server: Server) -> int:
    """The status of `/health`; 0 where nobody listens."""
    try:
        return server.client.get("/health").status_code
    except httpx2.TransportError:
        return 0


@difference(
    "Pages that may ask (`--allowed-origins`)",
    theirs="Those of any site",
    ours="Those of this computer and its apps (`vscode-webview://`, `app://`, `tauri://`), and what the flag adds; a request from elsewhere gets 403",
    flag="--allowed-origins",
)
def foreign_origins(theirs: Server, ours: Server) -> None:
    page = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    allowed = "access-control-allow-origin"
    assert theirs.client.options(CHAT, headers=page).headers[allowed] == "*"
    assert allowed not in ours.client.options(CHAT, headers=page).headers
    body = {"messages": user("Hello, I am Nora."), "max_tokens": 2, **INSTANT}
    asked = [s.client.post(CHAT, json=body, headers=page).status_code for s in (theirs, ours)]
    assert asked == [200, 403]
    for own in ("http://localhost:3000", "vscode-webview://abc", "app://obsidian.md"):
        page["Origin"] = own
        assert ours.client.options(CHAT, headers=page).headers[allowed] in ("*", own)


@difference(
    "The `Host` header",
    theirs="Any",
    ours="Must name this computer, also as its containers do (`host.docker.internal`), the address given by `--host`, or what `--allowed-hosts` adds, else 403",
)
def foreign_hosts(theirs: Server, ours: Server) -> None:
    strange = {"Host": "elsewhere.example"}
    asked = [s.client.get("/v1/models", headers=strange).status_code for s in (theirs, ours)]
    assert asked == [200, 403]
    inside = {"Host": "host.docker.internal:8080"}
    assert ours.client.get("/v1/models", headers=inside).status_code == 200


@difference(
    "Images and their URLs",
    theirs="URLs are fetched, even for a model that reads only text",
    ours="Refused with 400 in the question to be answered, a sentence in their place elsewhere; nothing is fetched",
)
def images(theirs: Server, ours: Server) -> None:
    for server, fetched in ((theirs, True), (ours, False)):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(2 if fetched else 0.3)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/cat.png"
            part = {"type": "image_url", "image_url": {"url": url}}
            messages = [{"role": "user", "content": [part]}]
            asking = threading.Thread(
                target=lambda s=server, m=messages: survives(s, CHAT, messages=m)
            )
            asking.start()
            try:
                listener.accept()[0].close()
                came = True
            except TimeoutError:
                came = False
            asking.join()
        assert came is fetched
    refused = ours.post(CHAT, messages=messages)
    assert refused.status_code == 400
    assert "image" in refused.json()["error"]["message"].lower()


@difference(
    "Body size (`--max-body-bytes`)",
    theirs="Unlimited",
    ours="64 MiB, beyond it 413",
)
def large_bodies(theirs: Server, ours: Server) -> None:
    sent = raw_post(CHAT, b"{", Content_Length=str(2**26 + 1))
    assert raw_status(raw_exchange(ours, sent)) == 413
    assert raw_status(raw_exchange(theirs, sent, wait_seconds=1)) == 0  # it waits for the rest


@difference(
    "A request without `Content-Length`",
    theirs="Refused with 411",
    ours="Read in chunks as HTTP/1.1 has it",
)
def chunked_bodies(theirs: Server, ours: Server) -> None:
    body = json.dumps({"messages": user("Hello, I am Lars."), "max_tokens": 2, **INSTANT})
    asked = [
        s.client.post(CHAT, content=iter([body[:9].encode(), body[9:].encode()]))
        for s in (theirs, ours)
    ]
    assert [response.status_code for response in asked] == [411, 200]


@difference(
    "The signals SIGTERM and SIGINT",
    theirs="Running replies are cut off",
    ours="Running streams end with an error event and `[DONE]`; exit status 0",
)
def signals(theirs: Server, ours: Server) -> None:
    body = {"prompt": "Tell me everything.", "max_tokens": 2000, "stream": True}
    body["logit_bias"] = {"700": 100}  # without an end
    for server in (theirs, ours):
        with server.client.stream("POST", COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            next(line for line in lines if line.startswith("data:"))
            assert server.process is not None
            server.process.send_signal(signal.SIGTERM)
            rest = []
            with contextlib.suppress(httpx2.TransportError):
                rest.extend(line for line in lines if line.startswith("data:"))
        status = server.process.wait(30)
        if server is theirs:
            assert status != 0
            assert "data: [DONE]" not in rest
        else:
            assert status == 0
            assert "error" in json.loads(rest[-2].removeprefix("data: "))
            assert rest[-1] == "data: [DONE]"
        server.revive()


@difference(
    "A model that is not the served one",
    theirs="Any request may load one",
    ours="404, unless started with `--allow-model-switching`",
)
def other_models(theirs: Server, ours: Server) -> None:
    other = Path(theirs._log.name).with_suffix(".model")
    shutil.copytree(BUNDLED_MODEL, other)
    try:
        body = {"model": str(other), "messages": user("Hello, I am Dora."), "max_tokens": 2}
        asked = [server.post(CHAT, **body) for server in (theirs, ours)]
    finally:
        shutil.rmtree(other)
    assert [response.status_code for response in asked] == [200, 404]
    assert asked[1].json()["error"]["code"] == "model_not_found"


@difference(
    "`/v1/models`",
    theirs="Downloaded models, or an empty answer when nothing was ever downloaded; one model is a list too",
    ours="The served model, always; `/v1/models/{id}` is OpenAI's object or 404",
)
def models(theirs: Server, ours: Server) -> None:
    assert theirs.client.get("/v1/models").text == ""
    listed = ours.client.get("/v1/models").json()["data"]
    assert len(listed) == 1
    assert ours.client.get(f"/v1/models/{listed[0]['id']}").json() == listed[0]
    assert ours.client.get("/v1/models/nothing").status_code == 404


@difference(
    "`model` in replies to requests that named none",
    theirs="`default_model`",
    ours="The served model's id",
)
def named_models(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Hello, I am Omar."), "max_tokens": 2, **INSTANT}
    assert theirs.answer(CHAT, **body)["model"] == "default_model"
    served = ours.client.get("/v1/models").json()["data"][0]["id"]
    assert ours.answer(CHAT, **body)["model"] == served


@difference(
    "Histories",
    theirs="Rendered as they are, or 404, as for past calls whose arguments are no JSON",
    ours="[As they come](serving.md#requests): system messages before the first turn are one, `developer` is one of them",
)
def histories(theirs: Server, ours: Server) -> None:
    kind, question = {"role": "system", "content": "Be kind."}, user("Hello, I am Lea.")
    both, new, asked = [kind, kind, *question], {**kind, "role": "developer"}, {"max_tokens": 2}
    for messages in (both, [new, *question]):
        replies = [server.answer(CHAT, messages=messages, **asked) for server in (theirs, ours)]
        counts = [reply["usage"]["prompt_tokens"] for reply in replies]
        assert counts[0] > counts[1]
    call = {"function": {"name": "find_person", "arguments": "no JSON"}}
    past = [*question, {"role": "assistant", "tool_calls": [call]}, *question]
    statuses = [server.post(CHAT, messages=past, **asked).status_code for server in (theirs, ours)]
    assert statuses == [404, 200]


@difference(
    "Errors",
    theirs='`{"error": "text"}`, and 404 for much that is the request\'s fault',
    ours='OpenAI\'s `{"error": {"message", "type", "param", "code"}}` with OpenAI\'s status',
)
def errors(theirs: Server, ours: Server) -> None:
    body = {"prompt": [1, 2, "three"], "max_tokens": 2}
    asked = [server.post(COMPLETIONS, **body) for server in (theirs, ours)]
    assert [response.status_code for response in asked] == [404, 400]
    assert isinstance(asked[0].json()["error"], str)
    assert asked[1].json()["error"].keys() == {"message", "type", "param", "code"}
    assert theirs.client.get("/v1/nothing").text == "Not Found"
    assert ours.client.get("/v1/nothing").json()["error"]["message"]


@difference(
    "`null` for a field",
    theirs="Refused for most fields",
    ours="The default",
)
def nulls(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Hello, I am Lena."), **INSTANT}
    assert theirs.post(CHAT, **body, temperature=None).status_code == 400
    plain, null = ours.answer(CHAT, **body), ours.answer(CHAT, **body, temperature=None)
    assert plain["choices"] == null["choices"]


@difference(
    "Booleans and whole numbers",
    theirs="`max_tokens: true` is 1; `xtc_probability: 0` is refused",
    ours="`true` is not a number, 0 is",
)
def numbers(theirs: Server, ours: Server) -> None:
    body = {"messages": user("Hello, I am Mary."), **INSTANT}
    for field, status in (({"max_tokens": True}, [200, 400]), ({"xtc_probability": 0}, [400, 200])):
        asked = [server.post(CHAT, **body, **field).status_code for server in (theirs, ours)]
        assert asked == status


@difference(
    "Fields that would change the reply and are not supported",
    theirs="Ignored",
    ours="Refused with 400 where the reply would be wrong (`suffix`, `best_of` above `n`, `grammar`), else named in the header `X-Mlx-Hybridcache-Warning` and the log (`mirostat`)",
)
def unsupported_fields(theirs: Server, ours: Server) -> None:
    body = {"prompt": "Hello, I am Alan.", "max_tokens": 2}
    for field in ({"suffix": "."}, {"best_of": 2}, {"grammar": "root ::= x"}):
        asked = [server.post(COMPLETIONS, **body, **field).status_code for server in (theirs, ours)]
        assert asked == [200, 400]
    headers = [server.post(COMPLETIONS, **body, mirostat=2).headers for server in (theirs, ours)]
    assert ["x-mlx-hybridcache-warning" in each for each in headers] == [False, True]


@pytest.mark.parametrize("row", rows_of(__name__), ids=lambda row: row.probe.__name__)
def test_every_listed_difference_is_there(row, theirs, ours):
    """On mlx_lm.server as its column says, on ours as ours says."""
    ours.revive()
    row.probe(theirs, ours)
