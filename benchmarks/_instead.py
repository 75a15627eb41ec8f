"""What a user would take or build instead: huey with its SQLite storage, and a task per event with tenacity."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import threading
import time
from typing import TYPE_CHECKING

import httpx2
import tenacity
from huey import SqliteHuey  # type: ignore[import-untyped]
from huey.consumer import Consumer  # type: ignore[import-untyped]

from benchmarks._harness import Cost
from benchmarks._loops import BODY

if TYPE_CHECKING:
    from pathlib import Path

# The best rate of 2, 4, 8, 16 and 64 on two cores: more only wait for each other, for the file and the interpreter.
WORKERS = 4
KEY = b"k" * 32


def signed(id: str, body: bytes) -> dict[str, str]:
    """Return the headers of an attempt: Standard Webhooks, v1."""
    now = str(int(time.time()))
    digest = hmac.digest(KEY, f"{id}.{now}.".encode() + body, hashlib.sha256)
    signature = "v1," + base64.b64encode(digest).decode()
    return {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": now,
        "webhook-signature": signature,
    }


class _QuietConsumer(Consumer):  # type: ignore[misc]  # huey has no types
    """Leaves the signals of this process alone."""

    def _set_signal_handlers(self) -> None:
        pass


class _Sender:
    """What a task of huey's does; each worker thread has a client of its own."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._local = threading.local()
        self._lock = threading.Lock()
        self.clients: list[httpx2.Client] = []
        self.answered: set[str] = set()
        self.done = threading.Event()

    def send(self, id: str, url: str, body: bytes) -> None:
        """Sign and POST; raise unless it was accepted."""
        if not hasattr(self._local, "client"):
            self._local.client = httpx2.Client(trust_env=False, timeout=15.0)
            self.clients.append(self._local.client)
        self._local.client.post(url, content=body, headers=signed(id, body)).raise_for_status()
        with self._lock:
            self.answered.add(id)
            if len(self.answered) == self._count:
                self.done.set()


def huey_cost(path: Path, urls: list[str], count: int, workers: int = WORKERS) -> Cost:
    """Consume tasks that were enqueued before: huey's own retries, FULL, and no pause between tasks.

    It takes a task out of its file before it runs it: one that is running when the process dies is lost.
    """
    huey = SqliteHuey(filename=str(path), fsync=True)
    sender = _Sender(count)
    task = huey.task(retries=10, retry_delay=1)(sender.send)
    for number in range(count):
        task(f"evt_{number}", urls[number % len(urls)], BODY)
    consumer = _QuietConsumer(huey, workers=workers, worker_type="thread", initial_delay=0.001, max_delay=0.01)
    cpu, begin = time.process_time(), time.perf_counter()
    consumer.start()
    assert sender.done.wait(120), f"{len(sender.answered)} of {count} answered"
    cost = Cost((time.process_time() - cpu) / count * 1e6, count / (time.perf_counter() - begin))
    consumer.stop(graceful=True)
    for client in sender.clients:
        client.close()
    huey.storage.close()
    return cost


async def tenacity_cost(urls: list[str], count: int, in_flight: int) -> Cost:
    """Start a task for each event, which signs, POSTs and tries again. Nothing outlives the process."""
    limits = httpx2.Limits(max_connections=in_flight, max_keepalive_connections=in_flight)
    room = asyncio.Semaphore(in_flight)
    async with httpx2.AsyncClient(limits=limits, trust_env=False, timeout=15.0) as client:

        async def send(id: str, url: str) -> None:
            wait, stop = tenacity.wait_exponential(max=60), tenacity.stop_after_attempt(10)
            async for attempt in tenacity.AsyncRetrying(wait=wait, stop=stop, reraise=True):
                with attempt:
                    async with room:
                        answer = await client.post(url, content=BODY, headers=signed(id, BODY))
                        answer.raise_for_status()

        cost = Cost(0.0, 0.0)
        for amount in (in_flight * 2, count):  # first the connections get warm
            cpu, begin = time.process_time(), time.perf_counter()
            await asyncio.gather(*(send(f"evt_{n}", urls[n % len(urls)]) for n in range(amount)))
            cost = Cost((time.process_time() - cpu) / amount * 1e6, amount / (time.perf_counter() - begin))
        return cost
