"""The demo's receivers, in a process of their own: healthy, flaky, and gone. They verify every signature.

They talk with the demo over standard input and output, a JSON object a line: out go the ports, in come the secrets
(never on the command line, which everybody on the machine can read), and when the input ends out goes what they saw.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from hookwright.testing import Inbox, Received

if TYPE_CHECKING:
    from collections.abc import Callable

FAILS_BEFORE_IT_RECOVERS = 2


def healthy(received: Received) -> int:
    """Accept what is authentic."""
    return 200 if received.verified else 401


def gone(received: Received) -> int:
    """Say that nothing is wanted any more."""
    return 410 if received.verified else 401


def flaky() -> Callable[[Received], int]:
    """Fail twice, then accept."""
    seen: list[Received] = []

    def respond(received: Received) -> int:
        seen.append(received)
        return 503 if received.verified and len(seen) <= FAILS_BEFORE_IT_RECOVERS else healthy(received)

    return respond


async def main() -> None:
    """Serve until the input ends."""
    responders = {"healthy": healthy, "flaky": flaky(), "gone": gone}
    async with AsyncExitStack() as stack:
        inboxes = {name: await stack.enter_async_context(Inbox()) for name in responders}
        for name, inbox in inboxes.items():
            inbox.respond_with(responders[name])
        print(json.dumps({name: inbox.url for name, inbox in inboxes.items()}), flush=True)  # noqa: T201  # the protocol
        reader = asyncio.StreamReader()
        loop = asyncio.get_running_loop()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
        while line := await reader.readline():
            for name, secret in json.loads(line).items():
                inboxes[name].expect(secret)
        seen = {
            name: {"received": len(inbox.received), "verified": sum(bool(r.verified) for r in inbox.received)}
            for name, inbox in inboxes.items()
        }
        print(json.dumps(seen), flush=True)  # noqa: T201  # the protocol


if __name__ == "__main__":
    asyncio.run(main())
