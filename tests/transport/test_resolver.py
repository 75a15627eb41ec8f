"""The system's resolver: it answers, refuses, and delays neither the application nor other names."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest

from hookwright.transport._resolver import SystemResolver

if TYPE_CHECKING:
    from collections.abc import Iterator


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


class Lookups:
    """A look-up that answers, hangs or fails by name, and remembers what it was asked, in order."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.release = threading.Event()
        self.address = "192.0.2.1"

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        if host.startswith("hangs"):
            self.release.wait(30)
            raise OSError("no answer")
        if host.startswith("unknown"):
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [self.address]


class Time:
    """The loop's time, moved on by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        loop = asyncio.get_running_loop()
        real = loop.time
        self.ahead = 0.0
        monkeypatch.setattr(loop, "time", lambda: real() + self.ahead)


@pytest.fixture
def lookups() -> Iterator[Lookups]:
    found = Lookups()
    yield found
    found.release.set()


async def hang(resolver: SystemResolver, names: list[str]) -> None:
    """Ask for names that hang, and give up."""

    async def give_up(name: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await resolver(name, 80)

    await asyncio.gather(*(give_up(name) for name in names))


async def test_an_answer_is_used_for_a_minute_at_most(lookups: Lookups, monkeypatch: pytest.MonkeyPatch) -> None:
    time, resolver = Time(monkeypatch), SystemResolver(lookups)
    assert await resolver("a.example", 80) == ["192.0.2.1"]
    lookups.address = "192.0.2.2"
    time.ahead = 29
    assert await resolver("a.example", 443) == ["192.0.2.1"]
    assert lookups.asked == ["a.example"]
    time.ahead = 61
    assert await resolver("a.example", 80) == ["192.0.2.2"]
    resolver.close()


async def test_what_is_known_is_served_while_a_new_lookup_hangs_and_not_beyond_a_minute(
    lookups: Lookups, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        lookups(host, port)
        if len(lookups.asked) > 1:
            hanging.set()
            lookups.release.wait(30)
        return ["192.0.2.1"]

    time, resolver = Time(monkeypatch), SystemResolver(lookup)
    await resolver("a.example", 80)
    time.ahead = 40
    for _ in range(3):
        assert await resolver("a.example", 80) == ["192.0.2.1"]
    await asyncio.to_thread(hanging.wait, 10)
    assert lookups.asked == ["a.example"] * 2  # one at a time for each name
    time.ahead = 61
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await resolver("a.example", 80)
    resolver.close()


async def test_a_failure_is_not_remembered_as_an_answer(lookups: Lookups) -> None:
    resolver = SystemResolver(lookups)
    for _ in range(2):
        with pytest.raises(OSError, match="no such name"):
            await resolver("unknown.example", 80)
    assert lookups.asked == ["unknown.example"] * 2
    resolver.close()


async def test_names_that_hang_leave_threads_to_names_never_asked_for_and_to_those_that_answered(
    lookups: Lookups, monkeypatch: pytest.MonkeyPatch
) -> None:
    time, resolver = Time(monkeypatch), SystemResolver(lookups)
    await resolver("known.example", 80)
    await hang(resolver, [f"hangs{number}.example" for number in range(100)])
    assert sum(name.startswith("hangs") for name in lookups.asked) == 12  # never asked before: three quarters
    time.ahead = 61
    async with asyncio.timeout(5):
        assert await resolver("known.example", 80) == ["192.0.2.1"]
    lookups.release.set()
    while resolver._running:
        await asyncio.sleep(0.001)
    lookups.release.clear()
    lookups.asked.clear()
    await hang(resolver, [f"hangs{number}.example" for number in range(12)])
    assert len(lookups.asked) == 8  # silent the last time: half
    async with asyncio.timeout(5):
        assert await resolver("new.example", 80) == ["192.0.2.1"]
    resolver.close()


async def test_names_that_answered_once_and_then_hang_are_given_up(
    lookups: Lookups, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        lookups.asked.append(host)
        if hanging.is_set() and host.startswith("bad"):
            lookups.release.wait(30)
        return ["192.0.2.1"]

    time, resolver = Time(monkeypatch), SystemResolver(lookup)
    names = [f"bad{number}.example" for number in range(30)]
    for name in ("good.example", *names):
        await resolver(name, 80)
    hanging.set()
    time.ahead = 61
    await hang(resolver, names)
    assert lookups.asked.count("good.example") == 1
    time.ahead = 65  # beyond what a look-up may take
    async with asyncio.timeout(5):
        assert await resolver("good.example", 80) == ["192.0.2.1"]
    resolver.close()


async def test_a_name_that_was_not_asked_is_not_blamed(lookups: Lookups) -> None:
    resolver = SystemResolver(lookups)
    asking = [asyncio.create_task(hang(resolver, [f"hangs{number}.example"])) for number in range(12)]
    await asyncio.sleep(0)
    await hang(resolver, ["waits.example"])
    await asyncio.gather(*asking)
    assert "waits.example" not in lookups.asked
    assert "waits.example" not in resolver._silent
    resolver.close()


async def test_a_system_without_threads_is_a_failure_and_no_end(
    lookups: Lookups, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolver = SystemResolver(lookups)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        with pytest.raises(OSError, match="no thread left"):
            await resolver("a.example", 80)
    assert await resolver("a.example", 80) == ["192.0.2.1"]
    resolver.close()


async def test_a_lookup_that_nobody_waits_for_any_more_is_not_begun(lookups: Lookups) -> None:
    resolver = SystemResolver(lookups)
    await hang(resolver, [f"hangs{number}.example" for number in range(40)])
    lookups.release.set()
    while resolver._running:
        await asyncio.sleep(0.001)
    assert len(lookups.asked) == 12
    resolver.close()


async def test_a_lookup_that_raises_what_it_should_not_ends_no_thread() -> None:
    def lookup(host: str, port: int) -> list[str]:
        if host == "bad":
            raise RuntimeError("s3cret")
        return ["192.0.2.1"]

    resolver = SystemResolver(lookup)
    for _ in range(20):
        with pytest.raises(OSError, match="RuntimeError") as failed:
            await resolver("bad", 80)
        assert "s3cret" not in str(failed.value)
    assert await resolver("good", 80) == ["192.0.2.1"]
    resolver.close()


def test_a_resolver_can_be_used_in_one_loop_after_another(lookups: Lookups) -> None:
    resolver = SystemResolver(lookups)
    asyncio.run(hang(resolver, ["hangs.example"]))
    for _ in range(2):
        assert asyncio.run(_ask(resolver)) == ["192.0.2.1"]
    resolver.close()


async def _ask(resolver: SystemResolver) -> list[str]:
    return list(await resolver("a.example", 80))
