"""Who may ask, and from where: checked before anything is read or parsed."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ..errors import ApiError
from ..settings import Settings
from .wire import ErrorResponse

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
OWN_NAMES = LOOPBACK_NAMES | {"host.docker.internal", "host.containers.internal"}
"""Names that no web site can have: of this machine, and, in `.internal`, of it in its own containers."""

OWN_ORIGINS = (
    r"https?://(localhost|tauri\.localhost|127(\.\d+){3}|\[::1\])(:\d+)?"
    r"|(vscode-webview|app|tauri)://[^/]*"
)
"""Pages of this machine, and of apps on it, which have schemes of their own: a browser gives them to no
web site. `null` is not among them, as a sandboxed frame of any site has it."""

OPEN_PATHS = frozenset({"/health", "/"})
"""What may be asked without a key: by a monitor, and the page, which asks for the key itself."""

PAGE_FILES = "/page/"


class Gate:
    """Refuses foreign hosts and origins, and missing keys.

    A page on the web can send requests to this machine, and by rebinding its own name to 127.0.0.1
    even read the answers; so names that are not ours are refused. An address is nobody's name.
    `--allowed-hosts` and `--allowed-origins` add to what is allowed by default.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app = app
        self._key = settings.api_key
        self._any_origin = "*" in settings.allowed_origins
        self._origins = frozenset(settings.allowed_origins)
        self._any_host = self._any_origin or "*" in settings.allowed_hosts
        self._hosts = _own_names(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refused = self._refusal(scope, headers)
        if refused is not None:
            extra = {"WWW-Authenticate": "Bearer"} if refused.status_code == 401 else None
            await ErrorResponse(refused, extra)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> ApiError | None:
        if not self._knows_host(headers.get("host", "")):
            return ApiError(
                403,
                f"The Host {headers.get('host', '')!r} is not this server's name. Start it with "
                "--allowed-hosts NAME to serve under other names.",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is not None and not self._knows_origin(origin, headers.get("host", "")):
            return ApiError(
                403,
                f"Pages of {origin!r} may not call this server. Start it with --allowed-origins "
                f"{origin} to let them.",
                code="origin_not_allowed",
            )
        if self._needs_key(scope) and not self._has_key(headers):
            return ApiError(
                401,
                "Missing or wrong API key: send Authorization: Bearer KEY, or x-api-key: KEY.",
                code="invalid_api_key",
            )
        return None

    def _knows_host(self, host: str) -> bool:
        if self._any_host:
            return True
        name = _parts(f"//{host}").hostname or ""
        return name in self._hosts or ("*" in self._hosts and _is_address(name))

    def _knows_origin(self, origin: str, host: str) -> bool:
        if self._any_origin or origin in self._origins:
            return True
        if _parts(origin).netloc.lower() == host.lower():  # our own page, by a name that is ours
            return True
        return re.fullmatch(OWN_ORIGINS, origin) is not None

    def _needs_key(self, scope: Scope) -> bool:
        return (
            self._key is not None
            and scope["method"] != "OPTIONS"
            and scope["path"] not in OPEN_PATHS
            and not scope["path"].startswith(PAGE_FILES)
        )

    def _has_key(self, headers: Headers) -> bool:
        kind, _, sent = headers.get("authorization", "").partition(" ")
        # Anthropic's clients send a header of their own.
        is_bearer = kind.lower() == "bearer" and self._is_key(sent.strip())
        return self._is_key(headers.get("x-api-key", "")) or is_bearer

    def _is_key(self, sent: str) -> bool:
        assert self._key is not None
        return hmac.compare_digest(sent.encode(), self._key.encode())


def _own_names(settings: Settings) -> frozenset[str]:
    """The names under which this server is asked for; `*` stands for any address."""
    host = settings.host.lower()
    named = {name for o in settings.allowed_origins if (name := _parts(o).hostname)}
    names = OWN_NAMES | named | {name.lower() for name in settings.allowed_hosts} - {"*"} | {host}
    if not (_is_address(host) and ipaddress.ip_address(host).is_loopback) and host != "localhost":
        own = socket.gethostname().lower()
        names |= {"*", own, own.split(".")[0], f"{own.split('.')[0]}.local"}
    return frozenset(names)


def _parts(url: str) -> SplitResult:
    """The parts of `url`, all empty for what is none, as `http://[`: no name of ours, and no error."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
