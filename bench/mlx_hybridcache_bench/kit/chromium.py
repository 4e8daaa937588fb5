"""A headless Chromium that looks at a server's page, where one is installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)

QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-domain-reliability",
    "--no-first-run",
    "--no-default-browser-check",
    "--no-pings",
    "--disable-features=AutofillServerCommunication,OptimizationHints,MediaRouter",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
"""What a browser does on its own account is none of the page's; what is left of it gets nowhere."""


def executable() -> str | None:
    """The browser: $CHROMIUM, or the first of the usual names."""
    named = os.environ.get("CHROMIUM")
    return next(filter(None, map(shutil.which, [named] if named else NAMES)), None)


def missing() -> str | None:
    """Why there is no browser to look with; None when there is one."""
    if executable() is None:
        return "Chromium is not installed here (`apt-get install chromium`, or set CHROMIUM to its path)"
    if importlib.util.find_spec("playwright") is None:
        return "playwright, which drives Chromium, is not installed (the dev extra has it)"
    return None


@contextmanager
def launched(*flags: str) -> Iterator[Any]:
    """A headless browser of playwright's with a fresh profile."""
    from playwright.sync_api import sync_playwright

    # As root, which is how containers run, Chromium has no sandbox to start.
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable(), headless=True, args=[*QUIET, *root, *flags]
        )
        try:
            yield browser
        finally:
            browser.close()
