"""The system's resolver: it answers, refuses, and delays neither the application nor other names."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

from hookwright.transport._resolver import SystemResolver

if TYPE_CHECKING:
    import pytest


async def test_a_name_has_addresses_and_an_unknown_one_has_none() -> None:
    resolver = SystemResolver()
    both = await asyncio.gather(resolver("localhost", 80), resolver("localhost", 80))
    assert both[0] == both[1]
    assert set(both[0]) <= {"127.0.0.1", "::1"}
    assert both[0]
    for unknown in ("no-such-name.invalid", "a" * 70 + ".example", "a..b"):
        try:
            await resolver(unknown, 80)
        except OSError:
            continue
        raise AssertionError(unknown)
    resolver.close()


async def test_stalled_lookups_delay_neither_the_hosts_threads_nor_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    asked: list[str] = []
    real = socket.getaddrinfo

    def slow(host: str, *rest: int, **named: int) -> object:
        asked.append(host)
        if host.endswith("stalls.example"):
            release.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return real(host, *rest, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    resolver = SystemResolver()
    names = [f"{number}.stalls.example" for number in range(6)]

    async def give_up(name: str) -> str:
        try:
            async with asyncio.timeout(0.3):
                await resolver(name, 80)
        except TimeoutError:
            return "given up"
        return "answered"

    try:
        begin = time.monotonic()
        waiting = [asyncio.create_task(give_up(name)) for name in (*names, names[0])]
        await asyncio.sleep(0)
        assert await resolver("127.0.0.1", 80) == ["127.0.0.1"]
        assert await asyncio.to_thread(lambda: 42) == 42
        assert await asyncio.gather(*waiting) == ["given up"] * 7
        assert time.monotonic() - begin < 2
        assert asked.count(names[0]) == 1  # whoever asks for the same name meanwhile shares the look-up
    finally:
        release.set()
        resolver.close()


def test_a_stuck_lookup_does_not_delay_the_interpreters_exit() -> None:
    program = (
        "import asyncio, socket, threading\n"
        "from hookwright.transport._resolver import SystemResolver\n"
        "started = threading.Event()\n"
        "def stuck(*a, **k): started.set(); threading.Event().wait()\n"
        "socket.getaddrinfo = stuck\n"
        "async def main():\n"
        "    try:\n"
        "        async with asyncio.timeout(0.2): await SystemResolver()('h', 1)\n"
        "    except TimeoutError: print('given up', started.is_set())\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=10, check=True)
    assert done.stdout == "given up True\n"
