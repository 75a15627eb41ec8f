"""No descriptor is left: that is this machine's trouble, and costs no receiver an attempt."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import DirectTransport, Dispatcher, Failure, HttpxTransport, NetworkPolicy, Request
from hookwright.testing import Inbox
from hookwright.transport import _dial
from tests.conftest import until
from tests.faults.processes import child, integrity, look

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("transport", ["pooled", "direct"])
async def test_without_descriptors_attempts_wait_at_no_cost_and_go_out_when_there_are_some(
    transport: str, host: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    path = tmp_path / "hooks.db"
    async with Inbox() as inbox, child(transport, path) as process:
        await process.hear("started")
        async with Dispatcher(
            f"sqlite:///{path}", network=NetworkPolicy.development(), keys=[], deliver=False
        ) as other:
            await other.endpoints.create(inbox.url.replace("127.0.0.1", host), events=["*"])

        async def health() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(await process.ask("health"))
            return found

        async def is_told() -> bool:
            told = await health()
            return "attempts cannot be made from here: too many open files" in str(told["problems"])

        await process.ask("fill")
        assert await process.ask("emit evt_1") == "evt_1"
        await until(is_told)
        assert (await health())["state"] == "degraded"
        assert await process.ask("emit evt_2") == "evt_2"
        assert look(path, "SELECT count(*), sum(attempt_count) FROM hookwright_delivery") == [(2, 0)]
        assert look(path, "SELECT count(*) FROM hookwright_attempt") == [(0,)]
        assert inbox.received == []
        await process.ask("free")
        freed = time.monotonic()
        await inbox.wait_for(2, timeout=15)
        record_property(f"descriptors free again, {transport}, {host}: delivered after", time.monotonic() - freed)
        await until(lambda: _succeeded(path) == 2)
        now = await health()
        assert (now["in_flight"], now["leased"], now["pending"]) == (0, 0, 0)
        assert now["state"] == "degraded", "what went wrong just now is told for a minute"
    assert look(path, "SELECT DISTINCT error FROM hookwright_attempt") == [(None,)]
    assert sorted(one.event_id or "" for one in inbox.received) == ["evt_1", "evt_2"]
    assert integrity(path) == "ok"


@pytest.mark.parametrize("transport", ["pooled", "direct"])
async def test_without_descriptors_for_the_authorities_file_no_attempt_is_spent_on_tls(
    transport: str, tmp_path: Path
) -> None:
    path = tmp_path / "hooks.db"
    async with child(transport, path) as process:
        await process.hear("started")
        async with Dispatcher(
            f"sqlite:///{path}", network=NetworkPolicy.development(), keys=[], deliver=False
        ) as other:
            await other.endpoints.create("https://127.0.0.1/", events=["*"])

        async def is_told() -> bool:
            told: dict[str, Any] = json.loads(await process.ask("health"))
            return "attempts cannot be made from here: too many open files" in str(told["problems"])

        await process.ask("fill")
        assert await process.ask("emit evt_1") == "evt_1"
        await until(is_told)
        assert look(path, "SELECT count(*), sum(attempt_count) FROM hookwright_delivery") == [(1, 0)]
        assert look(path, "SELECT count(*) FROM hookwright_attempt") == [(0,)]


@pytest.mark.parametrize("make", [HttpxTransport, DirectTransport])
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://receiver.example/", "no thread left for a look-up"),
        ("https://127.0.0.1/", "no thread left for a TLS context"),
    ],
)
async def test_a_system_without_threads_is_this_machines_trouble_too(
    make: type[HttpxTransport | DirectTransport], url: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    transport = make(network=NetworkPolicy.development())
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        assert await transport.send(Request(url, (), b"{}", "ep_1", 1)) == Failure("local_error", says)
    await transport.aclose()


@pytest.mark.parametrize(("reachable", "code"), [(True, "local_error"), (False, "connect_error")])
async def test_a_family_without_a_route_is_the_receivers_failure_and_no_port_left_is_ours(
    reachable: bool, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unavailable(*_: object) -> None:
        raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_connect", unavailable)
    monkeypatch.setattr(_dial, "_is_reachable", lambda address: reachable)
    transport = DirectTransport(network=NetworkPolicy.development())
    answer = await transport.send(Request("http://127.0.0.1:80/", (), b"{}", "ep_1", 1))
    assert isinstance(answer, Failure)
    assert answer.code == code
    await transport.aclose()


def _succeeded(path: Path) -> int:
    return len(look(path, "SELECT 1 FROM hookwright_delivery WHERE state = 'succeeded'"))
