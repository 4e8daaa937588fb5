"""The order of the suite, longest file first, and what each file costs: `pytest --cpu`."""

import gc
import logging
import os
import sys
from collections import Counter
from collections.abc import Generator, Iterator

import pytest

LONGEST = (
    *("test_cli.py", "test_stored_heads.py", "test_state_machine.py", "test_group.py"),
    *("test_group_disk.py", "test_borrowing.py", "test_retained.py"),
    *("test_bench_ttft_servers.py", "test_equality.py", "test_disk_kills.py"),
    *("test_server_page_browser.py", "test_server_limits.py", "test_group_server.py"),
    *("test_group_failures.py", "test_group_verify.py", "test_server_stable.py"),
    *("test_bench_ttft.py", "test_bench.py", "test_router_measure.py", "test_draft_models.py"),
    *("test_heads.py", "test_plan.py", "test_replay_bounds.py", "test_bundled_model.py"),
    *("test_compressed.py", "test_forwards.py", "test_server_agreement.py"),
    *("test_server_explain.py", "test_server_fuzz.py", "test_memory.py", "test_speculation.py"),
    *("test_server_equality.py", "test_server_load.py", "test_server_adapters.py"),
    *("test_server_drafting.py", "test_server_page.py", "test_server_differences.py"),
    *("test_load.py", "test_router_discovery.py", "test_quantized.py", "test_bench_router.py"),
    *("test_router_serving.py", "test_disk.py", "test_bench_disk.py", "test_resident.py"),
    *("test_server_admission.py", "test_engine.py", "test_limits.py", "test_server_restart.py"),
)
"""Begun last, one of these would keep one of the workers running behind the others."""

spent = pytest.StashKey[float]()


@pytest.fixture(scope="session", autouse=True)
def what_costs_much_is_done_once() -> Iterator[None]:
    """Questions to models, where any test of this run makes caches; imports, where any starts servers."""
    with pytest.MonkeyPatch.context() as patch:
        if "mlx_hybridcache.settings" in sys.modules:
            import told_once

            told_once.patch(patch)
        if "mlx_hybridcache_bench.serving.servers" in sys.modules:
            import forks

            forks.patch(patch)
        yield


@pytest.fixture(autouse=True)
def logging_is_left_as_it_was() -> Iterator[None]:
    """A handler that stays writes to a stream that ended with its test, wherever later ones log anything."""
    before = _logging()
    yield
    assert _logging() == before


def _logging() -> tuple[int, list[logging.Handler], list[logging.Handler]]:
    """The root logger's level and handlers, and whichever handler of any logger can write no more.

    Without pytest's, which come and go with the phases of a test.
    """
    root = logging.getLogger()
    loggers = [root, *root.manager.loggerDict.values()]
    return (
        root.level,
        [each for each in root.handlers if not type(each).__module__.startswith("_pytest.")],
        [
            each
            for logger in loggers
            for each in getattr(logger, "handlers", ())  # a placeholder has none
            if getattr(getattr(each, "stream", None), "closed", False)
        ],
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--cpu`: unlike the seconds of a clock, these do not depend on what else the machine does."""
    parser.addoption(
        "--cpu", action="store_true", help="CPU seconds of each file, with its processes'"
    )


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What importing the tests makes, half a million objects, stays: it is looked through never, or once for each time
    that a test lets go of cycles, a quarter of a second each.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files are handed to the workers in this order."""
    rank = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))


def pytest_collection_finish(session: pytest.Session) -> None:
    """From here on it counts."""
    session.config.stash[spent] = cpu_seconds()


def cpu_seconds() -> float:
    """This process's, with those of its processes that have ended, or were forked."""
    forks = sys.modules.get("forks")
    return sum(os.times()[:4]) + (forks.cpu_seconds() if forks else 0.0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note what was spent since the last report; a process that was not forked (`forks.py`) counts where it ends."""
    report = yield
    if not item.config.getoption("cpu"):
        return report
    now = cpu_seconds()
    report.cpu_seconds = now - item.config.stash[spent]
    item.config.stash[spent] = now
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Files in the order of what they cost, and the dearest tests."""
    if not terminalreporter.config.getoption("cpu"):
        return
    files, tests = Counter[str](), Counter[str]()
    for reports in terminalreporter.stats.values():
        for each in reports:
            if seconds := getattr(each, "cpu_seconds", 0.0):
                files[each.location[0]] += seconds
                tests[each.nodeid] += seconds
    terminalreporter.section(f"{files.total():.0f} CPU seconds")
    for counted, most in ((files, None), (tests, 60)):
        for name, seconds in counted.most_common(most):
            terminalreporter.write_line(f"{seconds:8.1f} {name}")
