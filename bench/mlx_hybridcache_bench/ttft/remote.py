"""A server that somebody else started: LM Studio, Ollama, or any other, by its URL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2

from ..serving.servers import ServerError
from .contenders import Contender

ANSWER_SECONDS = 20.0


class RemoteServer:
    """It can be asked whether it is there, and not be started again."""

    def __init__(self, name: str, url: str, api_key: str | None) -> None:
        self.name = name
        self.url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> httpx2.Response | None:
        """What it answers; None when nobody does."""
        try:
            return httpx2.get(
                f"{self.url}{path}",
                headers=self._headers,
                timeout=ANSWER_SECONDS,
                trust_env=False,
            )
        except httpx2.HTTPError:
            return None

    def healthy(self) -> bool:
        answer = self.get("/v1/models")
        return answer is not None and answer.status_code < 500

    def restart(self) -> bool:
        if not self.healthy():
            raise ServerError("it answers no more, and is not ours to start again")
        return False

    def cpu_seconds(self) -> float | None:
        return None

    def models(self) -> list[str]:
        """The models that it names, in its order."""
        answer = self.get("/v1/models")
        if answer is None or answer.status_code != 200:
            return []
        try:
            return [str(each["id"]) for each in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []

    def version(self) -> str:
        """As llama-server and Ollama tell it, or what it calls itself in the header `Server`."""
        told = ""
        for path, key in (("/props", "build_info"), ("/api/version", "version")):
            answer = self.get(path)
            if answer is None:
                break
            told = told or answer.headers.get("Server", "")
            try:
                return str(answer.json()[key])
            except (ValueError, KeyError, TypeError):
                continue
        return told


def at_url(
    given: str, *, model: str | None, fields: Mapping[str, Any], api_key: str | None
) -> Contender:
    """The server at `URL` or `NAME=URL`, with or without `/v1`. Raises `ServerError`.

    `model` is what requests name; it may be left out where the server has one only.
    """
    name, equals, url = given.partition("=")
    if not equals or "://" in name:
        name, url = "", given
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ServerError(f"{url!r} is not a URL; write http://localhost:1234.")
    name = name or parts.netloc.rpartition("@")[2]
    server = RemoteServer(name, url, api_key)
    if not server.healthy():
        return Contender(name, missing=f"nothing answers at {parts.scheme}://{parts.netloc}")
    models = server.models()
    if model is None and len(models) > 1:
        raise ServerError(
            f"{name} has several models; name one with --served-model: {', '.join(models)}"
        )
    model = model or next(iter(models), None)
    return Contender(
        name,
        url=url,
        version=server.version(),
        model={"name": model or "unknown"},
        fields={**fields, **({"model": model} if model else {})},
        api_key=api_key,
    )
