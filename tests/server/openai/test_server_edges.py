"""What stands before the routes: who may ask, what is said of what is not served, and what the log says."""

from __future__ import annotations

import re

import pytest
from mlx_hybridcache_server.http.gate import Gate
from mlx_hybridcache_server.replies.notices import WARNING_HEADER
from mlx_hybridcache_server.settings import Settings, build_parser, read_settings
from servers import CHAT, COMPLETIONS, OURS, raw_exchange, running, user
from starlette.datastructures import Headers


@pytest.fixture(scope="module")
def server():
    flags = ["--allowed-origins", "https://app.example", "--allowed-hosts", "box.example,10.0.0.7"]
    with running(OURS, *flags) as server:
        yield server


def lines(server, pattern):
    """The lines of the log since it was last looked at that have `pattern`."""
    return [line for line in server.newly_logged().splitlines() if re.search(pattern, line)]


def test_head_is_answered_wherever_get_is(server):
    """The same status and type, and no body: monitors ask so."""
    for path in ("/health", "/v1/models", "/v1/models/default_model", "/v1/cache", "/metrics", "/"):
        get, head = server.client.get(path), server.client.head(path)
        assert head.status_code == get.status_code == 200, path
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.content == b""
    raw = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert raw_exchange(server, raw).endswith(b"\r\n\r\n")
    assert server.client.head("/v1/nothing").status_code == 404
    assert server.client.head(CHAT).status_code == 405


def test_an_address_may_end_in_a_slash(server):
    """As in mlx_lm.server `//v1/models` is `/v1/models`, and a slash behind it names no model."""
    for path in (b"//health", b"//v1/models", b"///v1/models", b"/v1/models/"):
        sent = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        assert raw_exchange(server, sent).split()[1] == b"200", path
    plain, slash = (server.client.get(path).json() for path in ("/v1/models", "/v1/models/"))
    assert plain == slash
    assert slash["object"] == "list"


def test_what_is_not_served_says_what_is(server):
    """404 lists the paths, 405 the methods, in its `Allow` too: all of a path, not of one route."""
    error = server.client.post("/v1/images/generations").json()["error"]
    assert error["code"] == "not_found"
    for path in (CHAT, COMPLETIONS, "/v1/models", "/health"):
        assert path in error["message"]
    assert "/page/" not in error["message"]
    assert "/v1/models/{name}," in error["message"]
    for method, path, allowed in [
        ("GET", CHAT, "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("PUT", "/v1/cache", "DELETE, GET, HEAD"),
        ("PATCH", "/v1/cache/pin", "DELETE, POST"),
    ]:
        response = server.client.request(method, path)
        assert response.status_code == 405
        assert response.headers["Allow"] == allowed
        assert f"takes {allowed}" in response.json()["error"]["message"]
    missing = server.client.get("/v1/models/nothing").json()["error"]
    assert missing["code"] == "model_not_found"  # the route's own 404, which names what there is
    assert missing["message"] == "No model 'nothing' is served; 'mlx-hybridcache-demo' is."


def test_whatever_is_refused_leaves_one_line_without_what_was_sent(server):
    """Path, status and reason, for what routes, validation, JSON, the gate and the framework refuse."""
    server.newly_logged()
    secret = "unmistakable words"
    client = server.client
    bodies = [{"messages": user(secret), "stop": 5}, {"messages": user(secret), "model": "no"}]
    responses = [client.post(CHAT, json=body) for body in bodies]
    responses += [client.post(COMPLETIONS, content=secret), client.get("/v1/x%0A%C3%A9")]
    responses += [client.delete(CHAT)]
    responses += [client.get("/health", headers={"Host": "a.example"})]
    responses += [client.get("/health", headers={"Origin": "null"})]
    assert [each.status_code for each in responses] == [400, 404, 400, 404, 405, 403, 403]
    said = lines(server, ": 4\\d\\d ")
    assert [line.partition(" - INFO - ")[2] for line in said] == [
        f"POST {CHAT}: 400 invalid_request_error (stop)",
        f"POST {CHAT}: 404 model_not_found (model)",
        f"POST {COMPLETIONS}: 400 invalid_request_error",
        "GET /v1/x\\n\\xe9: 404 not_found",
        f"DELETE {CHAT}: 405 method_not_allowed",
        "GET /health: 403 host_not_allowed",
        "GET /health: 403 origin_not_allowed",
    ]
    assert secret not in server.log
    raw_exchange(server, b"GET\r\n\r\n")
    assert lines(server, "400 invalid_http")
    client.get("/health")
    assert not lines(server, "health")


def knows(settings, host="localhost", origin=None):
    """Whether the gate lets a request pass."""
    pairs = {"host": host} | ({"origin": origin} if origin else {})
    scope = {"type": "http", "method": "GET", "path": "/v1/models"}
    return Gate(None, settings)._refusal(scope, Headers(pairs)) is None


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:3000", True),
        ("vscode-webview://1a2b3c", True),
        ("app://obsidian.md", True),
        ("tauri://localhost", True),
        ("http://tauri.localhost", True),
        ("null", False),
        ("file://", False),
        ("https://app.evil.example", False),
        ("app://x/https://evil.example", False),
        ("http://tauri.localhost.evil.example", False),
        ("xapp://y", False),
        ("https://app.example", False),
    ],
)
def test_pages_of_this_machine_and_its_apps_may_ask_and_no_web_site(origin, allowed):
    """By default; a flag adds its own and takes none of these away."""
    assert knows(Settings(), origin=origin) is allowed
    more = Settings(allowed_origins=("https://app.example",))
    assert knows(more, origin=origin) is (allowed or origin == "https://app.example")


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("host.docker.internal:8080", True),
        ("host.containers.internal", True),
        ("LOCALHOST", True),
        ("[::1]:8080", True),
        ("docker.internal", False),
        ("host.docker.internal.evil.example", False),
        ("rebound.example", False),
        ("192.168.1.5", False),
        ("", False),
    ],
)
def test_a_name_that_a_web_site_may_have_is_refused(host, allowed):
    """What is rebound to 127.0.0.1 names itself in `Host`. Names are added one by one, or all with `*`."""
    assert knows(Settings(), host) is allowed
    assert knows(Settings(allowed_hosts=("box.example",)), host) is allowed
    assert knows(Settings(allowed_hosts=("box.example", "192.168.1.5")), "box.example:80")
    assert knows(Settings(allowed_hosts=("*",)), host)
    assert not knows(Settings(allowed_hosts=("*",)), host, "https://evil.example")


def test_a_page_of_this_server_may_ask_it():
    """By a name that was added, however it is written."""
    named = Settings(allowed_hosts=("box.example",))
    assert knows(named, "BOX.example:80", "http://box.example:80")
    assert not knows(named, "box.example:80", "http://box.example")
    assert not knows(named, "box.example:80", "http://rebound.example:80")


def test_hosts_are_read_without_schemes_and_ports(capsys):
    """Two names, an address in brackets; a URL is refused with a sentence."""
    parser = build_parser("serve")
    found = read_settings(parser, ["--allowed-hosts", "box.example, [fe80::1]"]).allowed_hosts
    assert found == ("box.example", "fe80::1")
    with pytest.raises(SystemExit):
        read_settings(parser, ["--allowed-hosts", "http://box.example"])
    assert "leave out http://" in capsys.readouterr().err


def test_what_flags_add_is_let_in_over_http(server):
    """Hosts and origins by flag, beside this machine's."""
    for host, status in [
        ("box.example", 200),
        ("10.0.0.7:1", 200),
        ("localhost", 200),
        ("a.example", 403),
    ]:
        assert server.client.get("/v1/models", headers={"Host": host}).status_code == status
    preflight = {"Access-Control-Request-Method": "POST"}
    for origin in ("https://app.example", "http://localhost:5173", "vscode-webview://1a2b"):
        answer = server.client.options(CHAT, headers={"Origin": origin, **preflight})
        assert answer.headers["access-control-allow-origin"] == origin


def test_a_page_of_another_network_that_is_let_in_passes_its_preflight(server):
    """Chromium asked so before a site's request to this machine, and wants 2xx; others still get 403."""
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "content-type",
        "Access-Control-Request-Private-Network": "true",
    }
    answer = server.client.options(CHAT, headers={"Origin": "https://app.example", **preflight})
    assert answer.status_code == 204
    assert answer.headers["access-control-allow-private-network"] == "true"
    other = server.client.options(CHAT, headers={"Origin": "https://evil.example", **preflight})
    assert other.status_code == 403
    del preflight["Access-Control-Request-Private-Network"]
    answer = server.client.options(CHAT, headers={"Origin": "https://app.example", **preflight})
    assert "access-control-allow-private-network" not in answer.headers


def test_a_page_may_read_what_a_reply_is_told_beside_itself(server):
    """Browsers hide every header that is not named as open."""
    body = {"messages": user("Hi"), "max_tokens": 1, "mirostat": 2}
    answer = server.client.post(CHAT, json=body, headers={"Origin": "https://app.example"})
    assert answer.headers[WARNING_HEADER].startswith("mirostat")
    assert WARNING_HEADER in answer.headers["access-control-expose-headers"]


def test_origins_are_read_as_browsers_write_them():
    """A space behind the comma, a slash at the end, capitals: none of which a browser sends."""
    flags = ["--allowed-origins", "https://App.example/, vscode-file://vscode-app"]
    found = read_settings(build_parser("serve"), flags).allowed_origins
    assert found == ("https://app.example", "vscode-file://vscode-app")
