"""Fixtures for every test; each process of a parallel run computes on one core."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from benchmarks.redis_server import RedisServer
from tests.support.serving import Service, serving

# A busy machine is slow, not wrong: no example has a deadline, nor the making of them.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

# Under `auto` each server of a test would first convert its networks; tests of it set `auto`.
os.environ.setdefault("VOUCHSAFE_RUNTIME", "torch")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the long forms too: make test-long")


def pytest_configure() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:  # Before torch is imported, here and in children.
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = _longest_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
    if config.getoption("--long"):
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="a long form: make test-long runs it"))


def _longest_first(items: list[pytest.Item], processes: int) -> list[pytest.Item]:
    """The tests, so that each process begins with its share of the end-to-end files.

    These wait for long. pytest-xdist cuts the list into as many equal parts as processes.
    """
    by_file: dict[Path, list[pytest.Item]] = {}
    for item in items:
        by_file.setdefault(item.path, []).append(item)
    long = [tests for path, tests in by_file.items() if "e2e" in path.parts]
    short = iter(item for item in items if "e2e" not in item.path.parts)
    ordered: list[pytest.Item] = []
    for process in range(processes):
        begins = [item for tests in long[process::processes] for item in tests]
        size = (len(items) - len(ordered)) // (processes - process)
        ordered += [*begins, *islice(short, max(0, size - len(begins)))]
    return [*ordered, *short]


@pytest.fixture(autouse=True)
def _left_to_the_collector(request: pytest.FixtureRequest) -> Iterator[None]:
    """Collect a test's garbage within the test, not in a later one."""
    yield
    if request.node.get_closest_marker("filterwarnings"):
        gc.collect()


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with serving() as running:
        yield running


@pytest.fixture(scope="session")
def redis_program() -> None:
    """Skips where there is no redis-server; in CI there must be one."""
    _need("redis-server")


@pytest.fixture(scope="session")
def prometheus_programs() -> None:
    """Skips where there is no prometheus or promtool; in CI there must be both."""
    _need("prometheus")
    _need("promtool")


@pytest.fixture(scope="session")
def redis_server(
    redis_program: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisServer]:
    """One server for the whole session; each test uses its own prefix."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_server(redis_program: None, tmp_path: Path) -> Iterator[RedisServer]:
    """A server that the test may kill."""
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


def _need(program: str) -> None:
    if shutil.which(program) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs {program}")
        pytest.skip(f"{program} is not installed")
