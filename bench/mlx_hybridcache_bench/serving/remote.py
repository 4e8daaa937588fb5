"""A server that somebody else started: LM Studio, Ollama, or any other, by its URL."""

from __future__ import annotations

from urllib.parse import urlsplit

import httpx2
import psutil

from .servers import ServerError, cpu_seconds

ANSWER_SECONDS = 20.0
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class RemoteServer:
    """It can be asked whether it is there, and not be started again."""

    def __init__(self, name: str, url: str, api_key: str | None) -> None:
        self.name = name
        self.url = url
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._pid: int | None = None  # 0 once it was looked for in vain

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
        """Of the process that listens at its port, where it runs on this machine and may be seen."""
        if self._pid is None:
            self._pid = _listener(self.url) or 0
        return cpu_seconds(self._pid) if self._pid else None

    def models(self) -> list[str]:
        """The models that it names, in its order."""
        answer = self.get("/v1/models")
        if answer is None or answer.status_code != 200:
            return []
        try:
            return [str(each["id"]) for each in answer.json()["data"]]
        except (ValueError, KeyError, TypeError):
            return []

    def chosen(self, model: str | None) -> str | None:
        """What requests name: `model`, else the only one that it has. Raises `ServerError`."""
        models = self.models()
        if model is None and len(models) > 1:
            raise ServerError(
                f"{self.name} has several models; name one with --served-model: {', '.join(models)}"
            )
        return model or next(iter(models), None)

    @property
    def silent(self) -> str:
        """What is said of it when nobody answers."""
        parts = urlsplit(self.url)
        return f"nothing answers at {parts.scheme}://{parts.netloc}"

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


def name_and_url(given: str) -> tuple[str, str]:
    """Of `URL` or `NAME=URL`, with or without `/v1`; the host names it. Raises `ServerError`."""
    name, equals, url = given.partition("=")
    if not equals or "://" in name:
        name, url = "", given
    url = url.rstrip("/").removesuffix("/v1")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ServerError(f"{url!r} is not a URL; write http://localhost:1234.")
    return name or parts.netloc.rpartition("@")[2], url


def _listener(url: str) -> int | None:
    """The number of the process that listens at a port of this machine."""
    parts = urlsplit(url)
    if parts.hostname not in LOOPBACK:
        return None
    for process in psutil.process_iter():
        try:
            sockets = process.net_connections("tcp")
        except psutil.Error:  # somebody else's
            continue
        listening = (each for each in sockets if each.status == psutil.CONN_LISTEN)
        if any(each.laddr.port == parts.port for each in listening):
            return process.pid
    return None
