"""What a model is called: short, never by its place on the disk, and with what fits into it."""

from __future__ import annotations

import shutil

import pytest
from mlx_hybridcache_server.generation.models import (
    BUNDLED_NAME,
    Named,
    own_names,
    short_name,
)
from mlx_hybridcache_server.settings import Settings
from servers import CHAT, INSTANT, OURS, running, user

from mlx_hybridcache.demo import BUNDLED_MODEL

HELLO = {"messages": user("Hello, I am Ken."), "max_tokens": 2, **INSTANT}


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """A copy of the bundled model in a directory of its own, under two aliases."""
    path = tmp_path_factory.mktemp("private") / "my-model"
    shutil.copytree(BUNDLED_MODEL, path)
    with running(OURS, "--model", str(path), "--alias", "gpt-4o", "--alias", "fast") as server:
        yield server, path


def test_a_model_is_called_by_its_directory_its_repository_or_its_alias(tmp_path):
    """The bundled one has a name of its own; what is no path stays as it is."""
    version = tmp_path / "models--mlx-community--Qwen3-Next" / "snapshots" / "0123abc"
    version.mkdir(parents=True)
    assert short_name(str(version)) == "mlx-community/Qwen3-Next"
    assert short_name(str(tmp_path)) == tmp_path.name
    assert short_name(str(BUNDLED_MODEL)) == BUNDLED_NAME
    assert short_name("owner/name") == "owner/name"
    assert own_names(Settings(aliases=("a", "b"))) == ("a", "b", BUNDLED_NAME, "default_model")
    for name in ("a", "default_model", BUNDLED_NAME):
        assert Named(name).resolved(Settings(aliases=("a",))).name == str(BUNDLED_MODEL)
    assert Named("other").resolved(Settings(aliases=("a",))).name == "other"


def test_every_name_is_answered_and_only_aliases_are_listed(named):
    """Two aliases in the list; default_model, the directory's name and its path mean the same model."""
    server, path = named
    listed = server.client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["gpt-4o", "fast"]
    assert {entry["context_length"] for entry in listed} == {listed[0]["max_model_len"]}
    assert listed[0]["context_length"] <= 131_072
    for name in ("gpt-4o", "fast", "default_model", "my-model", str(path)):
        assert server.answer(CHAT, **HELLO, model=name)["model"] == name
        found = server.client.get(f"/v1/models/{name}").json()
        assert found["id"] == ("fast" if name == "fast" else "gpt-4o")
    assert server.post(CHAT, **HELLO, model="gpt-3").status_code == 404


def test_no_reply_shows_where_a_model_lies(named):
    """Neither the list, nor a reply that names no model, nor an error, nor what the cache says."""
    server, path = named
    said = [server.client.get(where).text for where in ("/v1/models", "/v1/cache", "/v1/models/x")]
    said += [server.post(CHAT, **HELLO).text, server.post(CHAT, **HELLO, model="gpt-3").text]
    assert not any(str(path.parent) in text for text in said)
