"""FakeTransport: answers without a network, by a script."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import cast
from urllib.parse import urlsplit, urlunsplit

from hookwright.transport._base import Failure, Request, Response

Answer = int | Response | Failure
Script = Answer | Callable[[Request], "Answer | Awaitable[Answer]"] | Sequence["Script"]


class FakeTransport:
    """A Transport that answers by a script and keeps what was sent in `requests`.

    A script is a status, a Response, a Failure, a function of the Request that returns one of these (it may be async),
    or a list of scripts: one for each request, the last one for all that follow. `respond` sets one for a single url;
    `hang` is one that answers only after `release`.

    ```python
    from hookwright import Dispatcher
    from hookwright.testing import FakeTransport

    transport = FakeTransport([503, 200])
    async with Dispatcher("memory:", transport=transport) as dispatcher:
        await dispatcher.endpoints.create("https://example.com/hooks", events=["*"])
        await dispatcher.emit("ping", {})
        await dispatcher.drain()
        print(len(transport.requests))
    ```
    """

    def __init__(self, script: Script = 200) -> None:
        self._scripts: dict[str | None, _Play] = {None: _Play(script)}
        self._released = asyncio.Event()
        self.requests: list[Request] = []
        self.closed = False

    def respond(self, url: str, script: Script) -> None:
        """Answer requests to `url` by this script."""
        self._scripts[_canonical(url)] = _Play(script)

    async def hang(self, request: Request) -> Answer:
        """Wait for `release`, then answer 200: `FakeTransport(fake.hang)` or `fake.respond(url, fake.hang)`."""
        await self._released.wait()
        return 200

    def release(self) -> None:
        """Let everything that hangs be answered."""
        self._released.set()

    async def send(self, request: Request) -> Response | Failure:
        """Answer by the script."""
        self.requests.append(request)
        script = self._scripts.get(request.url, self._scripts[None]).next()
        if callable(script):
            answer = script(request)
            script = await answer if inspect.isawaitable(answer) else answer
        return Response(script) if isinstance(script, int) else script

    async def aclose(self) -> None:
        """Remember that it was closed."""
        self.closed = True


def _canonical(url: str) -> str:
    """Return the url as endpoints keep it: a scheme and a host in lower case, and a path."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme.lower(), parts.netloc.lower(), parts.path or "/", parts.query, ""))


class _Play:
    # A Response and a Failure are tuples, and yet one answer.
    def __init__(self, script: Script) -> None:
        is_list = isinstance(script, Sequence) and not isinstance(script, (Response, Failure))
        self._list: list[Script] = list(cast("Sequence[Script]", script)) if is_list else [script]

    def next(self) -> Answer | Callable[[Request], Answer | Awaitable[Answer]]:
        script = self._list.pop(0) if len(self._list) > 1 else self._list[0]
        if isinstance(script, (int, Response, Failure)) or callable(script):
            return script
        raise TypeError(f"a script within a list must be one answer or a function, not {script!r}")
