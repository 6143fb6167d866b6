"""Both clients behind the methods of one, so that one test is for both."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from service.client import AsyncClient, Client


class Blocking:
    """An `AsyncClient` whose methods block, so that one test is for both clients."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._client = AsyncClient(url, **options)

    def __enter__(self) -> Blocking:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._client.close())
        self._loop.close()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(self._client, name)(*arguments, **options)
            if hasattr(result, "__anext__"):
                return self._all(result)
            return self._loop.run_until_complete(result)

        return call

    def _all(self, iterator: Any) -> Iterator[Any]:
        while True:
            try:
                yield self._loop.run_until_complete(anext(iterator))
            except StopAsyncIteration:
                return
            except GeneratorExit:
                self._loop.run_until_complete(iterator.aclose())
                raise


BOTH = [pytest.param(Client, id="Client"), pytest.param(Blocking, id="AsyncClient")]
"""What makes a client of an address, for a parameter."""
