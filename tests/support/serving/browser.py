"""A real headless Chromium for the page's tests, and what it may not do."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlx_hybridcache_bench.kit.chromium import launched
from places import ROOT

PATIENCE_MS = 30_000

ARTEFACTS = Path(os.environ.get("MLX_HYBRIDCACHE_ARTEFACTS", ROOT / "artefacts"))
"""Where screenshots are kept."""


@dataclass
class Visit:
    """A page that is open, with what it said and asked for."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def value(self, name: str) -> float:
        """The number behind a figure."""
        return float(self.page.locator(f"data#{name}").get_attribute("value"))

    def until(self, script: str, *args: Any) -> None:
        """Wait until a JavaScript expression, or function of `args`, is true.

        Playwright's own way evaluates text on the page, which the page's policy does not allow.
        """
        ends = time.monotonic() + PATIENCE_MS / 1000
        while not self.page.evaluate(script, args[0] if args else None):
            assert time.monotonic() < ends, f"never became true: {script}"
            self.page.wait_for_timeout(50)


class Browser:
    """A browser that was started for one test module."""

    def __init__(self, chromium: Any, net_log: Path):
        self._chromium = chromium
        self._net_log = net_log

    @contextmanager
    def visit(self, url: str, *, errors: bool = False, **how: Any) -> Iterator[Visit]:
        """Open a page in a context of its own. Whatever it says on the console is a failure.

        With `errors` the test looks at `said` itself.
        """
        context = self._chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **how})
        context.set_default_timeout(PATIENCE_MS)
        visit = Visit(context.new_page())
        visit.page.on("console", lambda message: visit.said.append(message.text))
        visit.page.on("pageerror", lambda error: visit.said.append(str(error)))
        visit.page.on("request", lambda request: visit.asked.append(request.url))
        try:
            visit.page.goto(url)
            yield visit
            assert errors or visit.said == []
            assert visit.asked
            assert {urlsplit(each).netloc for each in visit.asked} == {urlsplit(url).netloc}
        finally:
            context.close()

    def hosts(self) -> set[str]:
        """Every host that a page has asked for, by the browser's own record of the network.

        A record has no initiator where the browser asked on its own account.
        """
        text = self._net_log.read_text(encoding="utf-8").rstrip().rstrip(",")
        events = json.loads(text if text.endswith("}]}") else text + "]}")["events"]
        asked = [each["params"] for each in events if "initiator" in each.get("params", {})]
        return {
            urlsplit(each["url"]).hostname or ""
            for each in asked
            if each["initiator"].startswith("http")
        }


@contextmanager
def chromium(folder: Path) -> Iterator[Browser]:
    """A headless browser with a fresh profile, whose record of the network lies in `folder`."""
    net_log = folder / "network.json"
    with launched(f"--log-net-log={net_log}", "--net-log-capture-mode=Default") as browser:
        yield Browser(browser, net_log)
