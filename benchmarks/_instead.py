"""What a user would take or build instead: huey with its SQLite storage, and a task per event with tenacity."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import sys
import time
from typing import TYPE_CHECKING

import httpx2
import tenacity

from benchmarks._harness import Cost
from benchmarks._loops import BODY

if TYPE_CHECKING:
    from pathlib import Path

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


async def huey_cost(path: Path, urls: list[str], count: int) -> Cost:
    """Let huey consume tasks that were stored before, in processes of its own."""
    command = (sys.executable, "-m", "benchmarks._huey", str(path), str(count), *urls)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    printed, _ = await process.communicate()
    assert process.returncode == 0
    return Cost(*json.loads(printed))


async def tenacity_cost(urls: list[str], count: int, in_flight: int) -> Cost:
    """Start a task for each event, which signs, POSTs and tries again. Nothing outlives the process."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
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
        for amount in (min(in_flight * 2, count), count):  # first the connections get warm
            cpu, begin = time.process_time(), time.perf_counter()
            await asyncio.gather(*(send(f"evt_{n}", urls[n % len(urls)]) for n in range(amount)))
            cost = Cost((time.process_time() - cpu) / amount * 1e6, amount / (time.perf_counter() - begin))
        return cost
