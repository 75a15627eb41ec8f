"""What a dispatcher promises, in an application that runs on uvloop."""

from __future__ import annotations

import asyncio
import sys
import time
from random import Random
from typing import TYPE_CHECKING, Any, Protocol

import pytest
import uvloop

from hookwright import DeliveryState, DirectTransport, Dispatcher, HttpxTransport
from hookwright.testing import FakeTransport
from hookwright.testing._transport_contract_base import OPEN, deaf, good, loopback, receiving, serving, trusting
from tests.faults.closing import close_often
from tests.faults.processes import ROOT, integrity
from tests.faults.test_cancellation import (  # noqa: F401  # run once more, on this loop
    test_a_start_that_is_cancelled_at_any_suspension_can_be_begun_again,
    test_a_verb_that_is_cancelled_at_any_suspension_is_done_whole_or_not_at_all,
    test_an_aclose_that_is_cancelled_at_any_suspension_goes_on_and_lets_go_of_everything,
)
from tests.test_emit import (  # noqa: F401  # run once more, on this loop
    test_use_at_the_wrong_time_or_place_says_which,
    test_use_in_a_forked_child_is_refused,
)

if TYPE_CHECKING:
    from pathlib import Path

    from hookwright import Transport

KINDS = pytest.mark.parametrize("kind", [DirectTransport, HttpxTransport])
SCHEMES = pytest.mark.parametrize("scheme", ["http", "https"])
SHUTDOWN_TIMEOUT = 0.2


class Kind(Protocol):
    """A transport of ours."""

    def __call__(self, **options: Any) -> Transport: ...


def dispatching(path: Path, kind: Kind) -> Dispatcher:
    transport = kind(network=OPEN, ssl_context=trusting(), resolver=loopback)
    return Dispatcher(f"sqlite:///{path}", transport=transport, keys=[], shutdown_timeout=SHUTDOWN_TIMEOUT)


async def test_it_is_uvloop_that_runs() -> None:
    assert isinstance(asyncio.get_running_loop(), uvloop.Loop)


@KINDS
@SCHEMES
async def test_what_is_emitted_is_delivered_over_sockets_and_its_history_kept(
    kind: Kind, scheme: str, tmp_path: Path
) -> None:
    path = tmp_path / "hooks.db"
    async with receiving(good, serving() if scheme == "https" else None) as receiver:
        async with dispatching(path, kind) as dispatcher:
            for _ in range(3):
                await dispatcher.endpoints.create(receiver.url(), events=["video.*"])
            receipts = await asyncio.gather(*(dispatcher.emit("video.ready", n) for n in range(50)))
            for receipt in receipts:
                for delivery in await dispatcher.deliveries.wait(receipt.event_id, timeout=10):
                    [attempt] = await dispatcher.deliveries.attempts(delivery.id)
                    assert delivery.state is DeliveryState.SUCCEEDED
                    assert (attempt.status, attempt.response_text) == (200, "good")
            assert (await dispatcher.health()).state == "healthy"
        await receiver.saw_all_close()
        assert len(receiver.requests) == 150
    assert integrity(path) == "ok"


@KINDS
@SCHEMES
async def test_closing_amid_hung_attempts_ends_in_time_and_the_next_delivers(
    kind: Kind, scheme: str, tmp_path: Path
) -> None:
    path, tls = tmp_path / "hooks.db", serving() if scheme == "https" else None
    async with receiving(deaf, tls) as receiver:
        async with dispatching(path, kind) as dispatcher:
            for _ in range(20):
                await dispatcher.endpoints.create(receiver.url(), events=["*"])
            await dispatcher.emit("video.ready")
            for _ in range(20):
                await receiver.arrived.get()
            begun = time.monotonic()
        assert time.monotonic() - begun < SHUTDOWN_TIMEOUT + 5  # the promised second is measured by the long form
        await receiver.saw_all_close()
        receiver.turn_good()
        async with dispatching(path, kind) as successor:
            await successor.drain(timeout=10)
            assert await successor.deliveries.count(status="succeeded") == 20


async def test_closing_ends_whatever_hangs(tmp_path: Path) -> None:
    figures = await close_often(tmp_path, 3, Random(0), lambda text: None)
    assert (figures.broken, figures.unheard) == ([], [])


async def test_an_emit_that_is_cancelled_is_stored_whole_or_not_at_all(tmp_path: Path) -> None:
    async with Dispatcher(f"sqlite:///{tmp_path / 'hooks.db'}", transport=FakeTransport(), keys=[]) as dispatcher:
        for number in range(2):
            await dispatcher.endpoints.create(f"https://receiver.example/{number}", events=["*"])
        emits = [asyncio.create_task(dispatcher.emit("video.ready", n)) for n in range(100)]
        for number, emit in enumerate(emits):
            if number % 10 == 0:
                await asyncio.sleep(0)
            if number % 2:
                emit.cancel()
        ended = await asyncio.gather(*emits, return_exceptions=True)
        await dispatcher.drain(timeout=10)
        told = sum(not isinstance(one, BaseException) for one in ended)
        stored = await dispatcher.deliveries.count(status="succeeded")
        assert 2 * told <= stored <= 200
        assert stored % 2 == 0


FORKING = """
import asyncio, os, sys
import uvloop
from hookwright import ConfigurationError, Dispatcher
from hookwright.testing import FakeTransport

async def main():
    async with Dispatcher(sys.argv[1], transport=FakeTransport(), keys=[]) as dispatcher:
        await dispatcher.endpoints.create("https://receiver.example/", events=["*"])
        child = os.fork()
        if not child:
            try:
                dispatcher.emit("video.ready").send(None)
            except ConfigurationError as error:
                os._exit(7 if "forked" in str(error) else 8)
            os._exit(9)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        await dispatcher.emit("video.ready")
        await dispatcher.drain()
        print(await dispatcher.deliveries.count(status="succeeded"))

uvloop.run(main())
"""


async def test_a_forked_child_is_refused_and_its_parent_goes_on(sqlite_url: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", FORKING, sqlite_url, stdout=asyncio.subprocess.PIPE, cwd=ROOT
    )
    said, _ = await child.communicate()
    assert (child.returncode, said.split()) == (0, [b"7", b"1"])
