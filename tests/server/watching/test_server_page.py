"""The page's side of the server: its files, who gets them, what its stream tells, what its buttons do."""

import json
import re
import threading
import time
from itertools import pairwise

import pytest
from bundled import never_ending, text
from mlx_hybridcache_server.generation.models import load
from mlx_hybridcache_server.generation.serving import Serving
from mlx_hybridcache_server.schema.requests import WatchBody
from mlx_hybridcache_server.settings import build_parser, read_settings
from mlx_hybridcache_server.watching.watch import MOST_WATCHING, Watcher
from servers import CHAT, COMPLETIONS, INSTANT, OURS, running, user
from stores.small_store import save

from mlx_hybridcache.store import conversations
from mlx_hybridcache.tokens import Namespace

WATCH = "/v1/cache/watch"
FILES = ("index.html", "app.js", "tree.js", "style.css", "icon.svg", "server.js")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("cache"))
    with running(OURS, "--cache-dir", folder, "--keepalive-seconds", "1") as server:
        yield server


@pytest.fixture(scope="module")
def strict():
    with running(
        OURS, "--api-key", "a-key", "--show-prompts", "--allowed-origins", "http://a.example"
    ) as each:
        yield each


def updates(server, count=1, *, headers=None, **body):
    """The first events of a page's stream."""
    found = []
    with server.client.stream("POST", WATCH, json=body, headers=headers) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                found.append(json.loads(line.removeprefix("data: ")))
                if len(found) == count:
                    break
    return found


def look(server, **body):
    return updates(server, **body)[0]


def prompt_of(count, start):
    """A prompt that nothing else here begins with."""
    return f"{start} {text(count, start)}"


def top(told):
    """The rows of the first namespace; each weighs what it shares and all below it."""
    runs = {run["key"]: run for run in told["tree"]["runs"]}
    return [runs[key] for key in told["tree"]["lists"][told["tree"]["shelves"][0]["key"]]["keys"]]


def last_run(server):
    """The run at the top of the tree that was used last."""
    runs = look(server)["tree"]["runs"]
    return max(runs, key=lambda run: run["used_at"] or 0)


# Files


def test_the_page_is_ours_and_may_do_nothing_else(server):
    """HTML, scripts, style and icon come with a policy that lets nothing in from elsewhere."""
    assert server.client.get("/").headers["content-type"].startswith("text/html")
    for name in FILES:
        reply = server.client.get(f"/page/{name}")
        assert reply.status_code == 200
        policy = reply.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in re.sub(r"http://www\.w3\.org/\d+/svg", "", reply.text)
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\son\w+=", reply.text
        )
    for name in ("nothing.js", "..%2Froutes.py", "%2e%2e/routes.py", "routes.py"):
        assert server.client.get(f"/page/{name}").status_code == 404


def test_the_key_guards_what_the_page_shows_and_not_the_page(strict):
    """Without a key: the page and its files, which say that one is needed. With it, the stream."""
    assert strict.client.get("/").status_code == 200
    assert strict.client.get("/page/server.js").text == "export const needsKey = true;\n"
    for method, path in (("POST", WATCH), ("POST", "/v1/cache/drop"), ("GET", "/v1/cache")):
        assert strict.client.request(method, path, json={}).status_code == 401
    key = {"Authorization": "Bearer a-key"}
    assert updates(strict, headers=key)[0]["cache"]["enabled"]


def test_the_page_may_call_its_own_server_whatever_origins_are_allowed(strict):
    """Its own origin is let in where --allowed-origins names others, and this machine's pages are; no site's is."""
    key = {"Authorization": "Bearer a-key"}
    for origin, status in (
        (strict.url, 404),
        ("http://a.example", 404),
        (f"http://127.0.0.1:{strict.port + 1}", 404),
        (f"http://127.0.0.1.evil.example:{strict.port}", 403),
        ("http://evil.example", 403),
        ("null", 403),
    ):
        reply = strict.client.post(
            "/v1/cache/drop", json={"key": "0" * 32}, headers={**key, "Origin": origin}
        )
        assert reply.status_code == status, origin
    rebound = {**key, "Host": "evil.example", "Origin": "http://evil.example"}
    assert strict.client.post("/v1/cache/drop", json={}, headers=rebound).status_code == 403


# The stream


def test_the_first_event_is_what_the_cache_says(server):
    """Figures equal /v1/cache, requests /v1/cache/recent, and the tree's bytes both tiers'."""
    server.answer(COMPLETIONS, prompt=prompt_of(600, 100), max_tokens=3)
    server.answer(COMPLETIONS, prompt=prompt_of(600, 100) + " more", max_tokens=3)
    until_written(server)
    told = look(server)
    assert told["cache"] == server.client.get("/v1/cache").json()
    assert told["recent"] == server.client.get("/v1/cache/recent").json()["data"]
    assert told["running"] == []
    requests = told["cache"]["requests"]
    assert 0 < requests["restored_tokens"] < requests["prompt_tokens"]
    weighs = told["cache"]["rows_bytes"] + told["cache"]["snapshot_bytes"]
    assert sum(run["total"]["memory"] for run in top(told)) == weighs
    on_disk = sum(run["total"]["disk"] for run in top(told))
    assert 0 < on_disk <= told["cache"]["disk"]["held_bytes"]
    (namespace,) = told["tree"]["shelves"]
    assert namespace["conversations"] == told["cache"]["conversations"]
    assert namespace["conversations"] == sum(run["conversations"] for run in top(told))


def until_written(server):
    until = time.monotonic() + 30
    while True:
        disk = server.client.get("/v1/cache").json()["disk"]
        if not disk["queued_bytes"] and not disk["unwritten"]:
            return
        assert time.monotonic() < until
        time.sleep(0.05)


def test_at_most_one_event_a_second_and_none_when_nothing_happens(server):
    """Under load: events are a second apart, tell what is new only, and stop with the load."""
    stop = threading.Event()

    def load():
        k = 0
        while not stop.is_set():
            server.answer(COMPLETIONS, prompt=prompt_of(20, 3000 + 10 * k), max_tokens=1)
            k += 1

    loading = threading.Thread(target=load)
    loading.start()
    try:
        found = updates(server, 4)
    finally:
        stop.set()
        loading.join()
    times = [told["time"] for told in found]  # the server's own, so that no delay here matters
    assert all(b - a >= 0.99 for a, b in pairwise(times))
    seen = [one["id"] for told in found for one in told.get("recent", ())]
    assert len(seen) == len(set(seen))
    assert "server" not in found[-1]
    until_written(server)
    began = time.monotonic()
    with server.client.stream("POST", WATCH, json={}) as response:
        lines = (line for line in response.iter_lines() if line)
        assert next(lines).startswith("data: ")
        assert next(lines) == ": keepalive"
    assert time.monotonic() - began < 10  # the flag's second, on a busy machine too


def test_a_page_that_comes_back_is_told_what_it_missed(server):
    """`since` as many requests as it knows: only those after; a number of another server: all."""
    server.answer(COMPLETIONS, prompt=prompt_of(20, 3900), max_tokens=2)
    before = look(server)
    server.answer(COMPLETIONS, prompt=prompt_of(20, 4000), max_tokens=1)
    known = {"since": before["remembered"], "started": before["server"]["started"]}
    (missed,) = look(server, **known)["recent"]
    assert missed["completion_tokens"] == 1
    all_of_them = min(100, before["remembered"] + 1)
    assert len(look(server, **{**known, "started": 1.0})["recent"]) == all_of_them


def test_what_runs_is_told_while_it_runs(server):
    """A reply of 300 tokens: reading or writing, with its prompt's length; then nothing any more."""
    body = {"prompt": prompt_of(50, 4500), "max_tokens": 300, "logit_bias": never_ending()}
    asking = threading.Thread(target=server.answer, args=(COMPLETIONS,), kwargs=body)
    asking.start()
    try:
        until = time.monotonic() + 20
        while not (found := look(server)["running"]) or found[0]["state"] == "queued":
            assert time.monotonic() < until
        (run,) = found
        assert run["state"] in ("reading", "writing")
        assert run["prompt_tokens"] >= 50
    finally:
        asking.join()
    assert look(server)["running"] == []


def test_only_what_is_unfolded_travels(server):
    """Two branches behind one beginning: told of as a number, and as runs once they are asked for."""
    beginning = prompt_of(300, 5000)
    for k in range(2):
        server.answer(
            COMPLETIONS, prompt=f"{beginning} branch {k} {text(30, 5500 + 100 * k)}", max_tokens=1
        )
    trunk = next(run for run in top(look(server)) if run["branches"])
    assert (trunk["branches"], trunk["conversations"]) == (2, 2)
    told = look(server, open={trunk["key"]: 30})["tree"]
    below = told["lists"][trunk["key"]]
    assert below["all"] == len(below["keys"]) == 2
    runs = {run["key"]: run for run in told["runs"]}
    for key in below["keys"]:
        assert runs[key]["start"] == trunk["end"]
        assert runs[key]["places"][-1][0] <= runs[key]["end"]
    assert len(look(server, open={trunk["key"]: 1})["tree"]["lists"][trunk["key"]]["keys"]) == 1
    biggest = top(look(server, order="size"))
    weights = [sum(run["total"].values()) for run in biggest]
    assert weights == sorted(weights, reverse=True)


def test_text_is_told_only_with_the_flag_and_never_of_salted_requests(server, strict):
    """Counts and hashes; with --show-prompts the beginning of a run, but not behind a salt."""
    server.answer(COMPLETIONS, prompt="Marmalade for everyone " + text(30, 6000), max_tokens=1)
    assert "armalade" not in json.dumps(look(server))
    key = {"Authorization": "Bearer a-key"}
    for salt in (None, "s"):
        body = {
            "prompt": f"Marmalade {salt} " + text(30, 6000),
            "max_tokens": 1,
            "cache_salt": salt,
        }
        assert strict.client.post(COMPLETIONS, json=body, headers=key).status_code == 200
    namespaces = updates(strict, headers=key)[0]["tree"]["shelves"]
    opened = {namespace["key"]: 9 for namespace in namespaces}
    told = updates(strict, headers=key, open=opened)[0]["tree"]
    kinds = {
        key: namespace["kind"]
        for namespace in namespaces
        for key in told["lists"][namespace["key"]]["keys"]
    }
    texts = {kinds[run["key"]]: run["text"] for run in told["runs"]}
    assert texts["own"].startswith("Marmalade None")
    assert texts["salted"] is None
    assert "Marmalade s" not in json.dumps(told)


def test_a_page_too_many_is_refused_and_a_page_that_leaves_makes_room(server):
    """Sixteen watch; the next one gets 429, until one has gone."""
    streams = [server.client.stream("POST", WATCH, json={}) for _ in range(MOST_WATCHING)]
    opened = [stream.__enter__() for stream in streams]
    try:
        assert all(response.status_code == 200 for response in opened)
        assert server.post(WATCH).status_code == 429
    finally:
        for stream in streams:
            stream.__exit__(None, None, None)
    until = time.monotonic() + 20
    while True:
        with server.client.stream("POST", WATCH, json={}) as response:
            if response.status_code == 200:
                break
        assert time.monotonic() < until


def test_the_stream_ends_with_the_server():
    """Told to stop while a page watches: the stream ends, and the exit status is 0."""
    with running(OURS) as server:
        ended = threading.Event()

        def watch():
            with server.client.stream("POST", WATCH, json={}) as response:
                for _ in response.iter_lines():
                    watching.set()
            ended.set()

        watching = threading.Event()
        threading.Thread(target=watch, daemon=True).start()
        assert watching.wait(20)
        assert server.stop() == 0
        assert ended.wait(20)  # whole: a connection that is cut off raises there
        assert "graceful" not in server.log
        server.start()  # `running` stops it once more


# What it costs


@pytest.fixture(scope="module")
def crowded():
    """A server without its socket, whose store holds a thousand conversations in 5,000 runs."""
    settings = read_settings(build_parser("serve"), [])
    serving = Serving(settings, load(settings, settings.model))
    engine = serving.loaded.cache.engine

    def fill():
        for k in range(1000):
            engine.tiers.memory.tick()
            for end in (4, 6, 8, 10, 12):
                save(engine.tiers.memory, chain(k, end), space=Namespace(engine.sharing.settings))
        engine.tiers.publish()

    serving.loaded.cache.worker.call(fill)
    yield serving
    serving.loaded.cache.worker.call(engine.tiers.memory.clear)
    serving.close()


def chain(k, end):
    return [7, 7, 100 + k, *range(end - 3)]


def test_an_update_asks_the_worker_for_nothing(crowded, monkeypatch):
    """Everything is told from what was published: the worker could stand still."""
    cache = crowded.loaded.cache
    watcher = Watcher(crowded, WatchBody())
    for name in ("call", "post", "stream"):
        monkeypatch.setattr(cache.worker, name, None)
    assert watcher.update()["cache"]["conversations"] == 1000
    assert watcher.update() == {}


def test_an_update_touches_only_what_changed(crowded, monkeypatch):
    """One of a thousand conversations behind two tokens goes on: what they share and it are grown anew,
    and it alone is told anew.
    """
    cache = crowded.loaded.cache
    engine = cache.engine
    watcher = Watcher(crowded, WatchBody())
    first = watcher.update()["tree"]
    assert len(first["runs"]) == 30
    assert [each["all"] for each in first["lists"].values()] == [1000]
    grown = []
    whole = conversations._grown
    monkeypatch.setattr(conversations, "_grown", lambda *how: grown.append(how) or whole(*how))

    def go_on():
        engine.tiers.memory.tick()
        save(engine.tiers.memory, chain(999, 13), space=Namespace(engine.sharing.settings))
        engine.tiers.publish()

    cache.worker.call(go_on)
    told = watcher.update()["tree"]
    assert (len(told["runs"]), len(grown)) == (1, 2)
    assert len(told["lists"]) == 1
    assert watcher.update() == {}


# What it does


def test_the_page_says_until_when_a_checkpoint_is_kept(server):
    """All of a prompt, for 24 hours: the last checkpoint that it was read to, by the wall clock."""
    now = time.time()
    said = {"messages": user(f"Where is {now}?"), "max_tokens": 1, "prompt_cache_retention": "24h"}
    server.answer(CHAT, **said)
    until = [each[5] for each in last_run(server)["places"] if each[5] is not None]
    assert [now + 86_400 <= each <= time.time() + 86_401 for each in until] == [True]


def test_pin_unpin_warm_and_drop_by_the_key_of_a_run(server):
    """A pinned run refuses to be dropped; unpinned it goes, in both tiers, and then is not found."""
    prompt = prompt_of(400, 7000)
    server.answer(COMPLETIONS, prompt=prompt, max_tokens=1)
    until_written(server)
    run = last_run(server)
    pinned = server.answer("/v1/cache/pin", key=run["resume"])
    assert (pinned["pinned"], pinned["position"]) == (True, run["places"][-1][0])
    assert pinned["replayed_tokens"] == 1
    assert last_run(server)["pins"] == [run["resume"]]
    refused = server.post("/v1/cache/drop", key=run["key"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "pinned")
    unpinned = server.client.request("DELETE", "/v1/cache/pin", json={"key": run["resume"]})
    assert unpinned.json() == {"pinned": False, "position": pinned["position"]}
    assert server.client.get("/v1/cache").json()["pinned"] == 0
    before = server.client.get("/v1/cache").json()
    assert server.answer("/v1/cache/drop", key=run["key"])["dropped"]
    after = server.client.get("/v1/cache").json()
    weighs = run["total"]["memory"]
    assert before["rows_bytes"] + before["snapshot_bytes"] - weighs == (
        after["rows_bytes"] + after["snapshot_bytes"]
    )
    assert after["running_bytes"] == 0
    gone = server.post("/v1/cache/drop", key=run["key"])
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_stored")
    again = server.answer(COMPLETIONS, prompt=prompt, max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] < 20


def test_what_lies_on_disk_is_warmed_from_there(tmp_path):
    """After a restart a run is on disk only; warming it reads no token, and then memory holds it too."""
    flags = ("--cache-dir", str(tmp_path))
    with running(OURS, *flags) as server:
        server.answer(COMPLETIONS, prompt=text(700), max_tokens=1)
    with running(OURS, *flags) as server:
        (run,) = look(server)["tree"]["runs"]
        assert [part[2:] for part in run["parts"]] == [[False, True]]
        assert (run["memory_bytes"], run["used_at"]) == (0, None)
        warmed = server.answer("/v1/cache/warm", key=run["resume"])
        assert (warmed["tier"], warmed["replayed_tokens"]) == ("disk", 1)
        assert warmed["position"] == run["places"][-1][0]
        (run,) = look(server)["tree"]["runs"]
        assert run["places"][-1][1] > 0
        assert run["memory_bytes"] > 0


def test_drop_by_prompt_and_by_messages(server):
    """What warm has read, drop forgets; a body that names nothing, two things or no key is refused."""
    for body in (
        {"prompt": prompt_of(200, 8000)},
        {"messages": [{"role": "system", "content": prompt_of(200, 8300)}], **INSTANT},
        {"prompt": prompt_of(200, 8600), "cache_salt": "s"},
    ):
        assert server.post("/v1/cache/drop", **body).status_code == 404
        server.answer("/v1/cache/warm", **body)
        assert server.answer("/v1/cache/drop", **body)["dropped"]
        assert server.post("/v1/cache/drop", **body).status_code == 404
    for body in ({}, {"prompt": "a", "key": "0" * 32}, {"key": "0" * 31}, {"key": "Z" * 32}):
        assert server.post("/v1/cache/drop", **body).status_code == 400


def test_a_reply_under_way_outlives_its_drop(server):
    """Dropped while it is written: every token comes."""
    body = {"messages": user(prompt_of(100, 9000)), "max_tokens": 120, "logit_bias": never_ending()}
    first = server.answer(CHAT, **body)
    reply = {}
    asking = threading.Thread(target=lambda: reply.update(server.answer(CHAT, **body)))
    asking.start()
    while not look(server)["running"] and asking.is_alive():
        time.sleep(0.01)
    server.post("/v1/cache/drop", key=last_run(server)["key"])
    asking.join()
    assert reply["choices"] == first["choices"]
