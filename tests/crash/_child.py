"""The process that is killed: a dispatcher that emits, and prints every id that `emit` acknowledged."""

from __future__ import annotations

import asyncio
import os
import sys

from hookwright import Dispatcher, NetworkPolicy, Profile, RetryPolicy

CONCURRENCY = 50
RATE = 200


async def main(database: str, first: int, count: int) -> None:
    """Emit `count` events named from `first` on (0: only deliver what is there), acknowledge each on stdout."""
    profiles = {"default": Profile(retry=RetryPolicy.schedule(*[0.05] * 50))}
    network = NetworkPolicy.development()
    async with Dispatcher(
        f"sqlite:///{database}", profiles=profiles, network=network, concurrency=CONCURRENCY, endpoint_concurrency=50
    ) as dispatcher:
        say("ready")
        if count == 0:
            await until_nothing_is_pending(dispatcher)
            return
        gate = asyncio.Semaphore(CONCURRENCY)

        async def one(number: int) -> None:
            async with gate:
                receipt = await dispatcher.emit("crash.test", {"n": number}, event_id=f"evt_{number}")
                say(receipt.event_id)

        async with asyncio.TaskGroup() as group:
            for number in range(first, first + count):
                group.create_task(one(number))
                await asyncio.sleep(1 / RATE)


async def until_nothing_is_pending(dispatcher: Dispatcher) -> None:
    """Return when every delivery has ended, retries included."""
    async with asyncio.timeout(60):
        cursor = None
        while True:
            page = await dispatcher.deliveries.list(limit=500, cursor=cursor)
            for delivery in page.items:
                await dispatcher.deliveries.wait(delivery.event_id)
            cursor = page.next_cursor
            if cursor is None:
                return


def say(text: str) -> None:
    """Write at once: what is still in a buffer dies with the process."""
    os.write(sys.stdout.fileno(), text.encode() + b"\n")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
