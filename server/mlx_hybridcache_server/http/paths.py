"""Paths as mlx_lm.server reads them, whose base address may end in a slash."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send


class Paths:
    """Takes several slashes at a path's beginning for one.

    Clients that put `/v1/...` behind an address that ends in a slash send two.
    """

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("//"):
            scope["path"] = "/" + scope["path"].lstrip("/")
        await self._app(scope, receive, send)
