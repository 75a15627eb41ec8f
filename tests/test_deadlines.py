"""Deadlines: whoever cancelled a task, it is known whose cancellation it was."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hookwright import Dispatcher, Profile, Request, Response, Timeouts
from hookwright._deadlines import Deadlines
from tests.conftest import URL, until

if TYPE_CHECKING:
    from hookwright import Delivery


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookwright._deadlines.OVERTIME", 0.0)
    monkeypatch.setattr("hookwright._deadlines._LOOK", 0.01)


class _Deaf:
    """A transport that knows no timeout."""

    async def send(self, request: Request) -> Response:
        await asyncio.Event().wait()
        raise AssertionError

    async def aclose(self) -> None:
        return


async def test_a_transport_that_does_not_keep_to_the_timeout_is_stopped() -> None:
    profiles = {"default": Profile(timeouts=Timeouts(total=0.01, connect=0.01, dns=0.01))}
    async with Dispatcher("memory:", transport=_Deaf(), profiles=profiles, keys=[]) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        receipt = await dispatcher.emit("video.ready")

        async def tried() -> Delivery | None:
            [row] = (await dispatcher.deliveries.list(event_id=receipt.event_id)).items
            return row if row.attempt_count else None

        await until(tried)
        [row] = (await dispatcher.deliveries.list(event_id=receipt.event_id)).items
        [attempt] = await dispatcher.deliveries.attempts(row.id)
        assert (attempt.error, attempt.detail) == ("timeout", "the transport did not keep to the total timeout")


@pytest.mark.parametrize("also", [False, True], ids=["alone", "and somebody else"])
async def test_a_cancellation_of_ours_is_over_at_the_end_and_another_one_counts(also: bool) -> None:
    deadlines, stopped = Deadlines(), []

    async def wait() -> int:
        task = deadlines.begin(0.0)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped.append(deadlines.has_stopped(task))
        finally:
            deadlines.end(task)
        return task.cancelling()

    task = asyncio.ensure_future(wait())
    await asyncio.sleep(0)
    deadlines._ends[task] = 0.0
    deadlines._look()
    if also:
        task.cancel()
    assert (await task, stopped) == (int(also), [not also])
