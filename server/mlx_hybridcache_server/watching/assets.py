"""The page's own files, as they lie in `page/`: served by this server, and by nothing else.

They hold no secret, so no key is needed for them; what they show is asked for with it.
"""

from __future__ import annotations

from importlib.resources import files
from typing import NamedTuple

from starlette.responses import Response

from ..errors import ApiError

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

HEADERS = {
    # Nothing but these files runs or is shown, nothing is sent elsewhere, no text becomes markup.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


class _Asset(NamedTuple):
    body: bytes
    kind: str


def _read() -> dict[str, _Asset]:
    found = {}
    for file in (files(__package__) / "page").iterdir():
        ending = file.name.rpartition(".")[2]
        if file.is_file() and ending in KINDS:
            found[file.name] = _Asset(file.read_bytes(), KINDS[ending])
    return found


_ASSETS = _read()


def asset(name: str, *, needs_key: bool = False) -> Response:
    """A file of the page. Raises `ApiError` 404 for any other name.

    `server.js` tells the page whether it must ask for a key, before anything is refused for lack of one.
    """
    if name == "server.js":
        text = f"export const needsKey = {'true' if needs_key else 'false'};\n"
        return Response(text, media_type=KINDS["js"], headers=HEADERS)
    found = _ASSETS.get(name)
    if found is None:
        raise ApiError(404, f"The page has no file {name!r}.")
    return Response(found.body, media_type=found.kind, headers=HEADERS)
