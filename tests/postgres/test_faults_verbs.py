"""Each verb, cut at every statement boundary: its effect is there whole or not at all, and it can be given again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import DeliveryState, HookwrightError, StorageUnavailable
from hookwright._models import AttemptRecord, Claim, Emission, EndpointState, Settled
from hookwright.storage._base import ClaimRequest, DeliveryFilter
from hookwright.storage.postgres._pool import CommitLost
from tests.conftest import until
from tests.postgres.cutting import Cut, Scene, idle, outcome, scene, tasks
from tests.postgres.proxy import Action

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

LEASE = 60_000_000
EVERYTHING = DeliveryFilter()


def _event(scene: Scene, number: int = 1) -> tuple[Any, list[Any]]:
    event = scene.world.new_event(id=f"evt_new_{number}", idempotency_key=f"key {number}")
    return event, [scene.world.new_delivery(scene.endpoint.id)._replace(id=f"dlv_new_{number}")]


def _settle(scene: Scene) -> Awaitable[Any]:
    retry = scene.world.outcome(scene.other, DeliveryState.PENDING, retry_in=LEASE)
    return scene.storage.settle([scene.world.outcome(scene.one, DeliveryState.FAILED, gone=True), retry])


def _record_test(scene: Scene) -> Awaitable[Any]:
    record = AttemptRecord(scene.world.clock.now(), 5, status=204)
    return scene.storage.record_test(Emission(*_event(scene)), DeliveryState.SUCCEEDED, record)


WRITES: dict[str, Callable[[Scene], Awaitable[Any]]] = {
    "acquire": lambda scene: scene.storage.acquire(),
    "enqueue": lambda scene: scene.storage.enqueue(*_event(scene), endpoints_revision=4),
    "enqueue_many": lambda scene: scene.storage.enqueue_many(
        [Emission(*_event(scene, 1)), Emission(*_event(scene, 2))], endpoints_revision=4
    ),
    "claim": lambda scene: scene.storage.claim(ClaimRequest(9, 9, LEASE, 4, {})),
    "settle": _settle,
    "release": lambda scene: scene.storage.release([scene.one, scene.other], sent=True, hold=LEASE),
    "requeue": lambda scene: scene.storage.requeue([scene.failed.id], [DeliveryState.CANCELLED]),
    "cancel": lambda scene: scene.storage.cancel([scene.waiting.id, scene.one.delivery_id]),
    "admit_test": lambda scene: scene.storage.admit_test(scene.endpoint.id, 1_000_000),
    "record_test": _record_test,
    "sweep": lambda scene: scene.storage.sweep(),
    "create_endpoint": lambda scene: scene.storage.create_endpoint(scene.world.new_endpoint(id="ep_new")),
    "update_endpoint": lambda scene: scene.storage.update_endpoint(replace(scene.endpoint, name="new")),
    "set_endpoint_state": lambda scene: scene.storage.set_endpoint_state(
        scene.endpoint.id, EndpointState.PAUSED, reason="manual"
    ),
    "delete_endpoint": lambda scene: scene.storage.delete_endpoint(scene.endpoint.id),
    "scrub_endpoints": lambda scene: scene.storage.scrub_endpoints(),
    "expunge": lambda scene: scene.storage.expunge(scene.waiting.event_id),
    "prune": lambda scene: scene.storage.prune(scene.world.clock.now() + 1),
}

READS: dict[str, Callable[[Scene], Awaitable[Any]]] = {
    "get_endpoint": lambda scene: scene.storage.get_endpoint(scene.endpoint.id),
    "list_endpoints": lambda scene: scene.storage.list_endpoints(limit=9, cursor=None, tenant=None),
    "changes": lambda scene: scene.storage.changes(0),
    "get_event": lambda scene: scene.storage.get_event(scene.quiet_event),
    "get_delivery": lambda scene: scene.storage.get_delivery(scene.waiting.id),
    "list_deliveries": lambda scene: scene.storage.list_deliveries(EVERYTHING, limit=9, cursor=None),
    "count_deliveries": lambda scene: scene.storage.count_deliveries(EVERYTHING),
    "attempts": lambda scene: scene.storage.attempts(scene.waiting.id),
    "stats": lambda scene: scene.storage.stats(scene.endpoint.id, 0),
    "backlog": lambda scene: scene.storage.backlog(),
}


@pytest.mark.parametrize("name", WRITES | READS)
async def test_a_verb_cut_at_any_statement_is_there_whole_or_not_at_all(
    postgres_dsn: str, postgres_schema: str, name: str
) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        cutting = _Cutting(setting, (WRITES | READS)[name])
        await cutting.count()
        for action in (Action.CUT_BEFORE, Action.CUT_AFTER):
            number, lost = 1, 0
            while await cutting.strike(number, action):
                lost += isinstance(cutting.answer, CommitLost)
                number += 1
            assert number >= 3
            # Its commit was cut: emits find out what became of it, other writes say that they do not know.
            assert lost == (name in WRITES and not name.startswith("enqueue"))


class _Cutting:
    def __init__(self, scene: Scene, verb: Callable[[Scene], Awaitable[Any]]) -> None:
        self._scene = scene
        self._verb = verb
        self._expected: Any = None
        self._untouched: Any = None
        self._done: Any = None
        self.answer: Any = None

    async def count(self) -> None:
        """See what it does where nothing is cut."""
        self._untouched = await self._scene.direct.dump()
        self._expected = await self._run()
        self._done = await self._scene.direct.dump()

    async def _run(self) -> Any:
        self._scene.storage._freed = False  # so that `acquire` does what it does
        self._scene.storage._pruned = (0, "")
        return _plain(await outcome(self._verb(self._scene), HookwrightError))

    async def strike(self, number: int, action: Action) -> bool:
        """Cut there; False when it was passed untouched."""
        scene = self._scene
        await scene.direct.restore()
        scene.storage._unknown.clear()
        scene.storage._lost_claims.clear()
        assert scene.storage._open is not None
        pool: Any = scene.storage._open.pool._pool
        if number == 1:
            await pool.expire_connections()  # connecting is the first boundary
        cut = scene.proxy.on_message = Cut(scene.proxy, number, action)
        before = tasks()
        self.answer = await self._run()
        scene.proxy.on_message = None
        if not cut.struck:
            assert self.answer == self._expected
            return False
        await until(lambda: idle(scene.storage))
        await until(lambda: tasks() <= before)
        await self._check(cut)
        return True

    async def _check(self, cut: Cut) -> None:
        stored = await self._scene.direct.dump()
        if isinstance(self.answer, CommitLost):
            assert stored in (self._untouched, self._done), cut
        elif isinstance(self.answer, StorageUnavailable):
            assert stored == self._untouched, cut
        else:
            assert self.answer == self._expected, cut
            assert stored == self._done, cut
        was_done = stored == self._done
        again = await self._run()
        if not was_done or self._done == self._untouched or _settled(again) or isinstance(again, tuple):
            assert again == self._expected, cut
        assert await self._scene.direct.dump() == self._done, cut


def _settled(answer: Any) -> bool:
    return isinstance(answer, list) and bool(answer) and isinstance(answer[0], (Settled, bool))


def _plain(answer: Any) -> Any:
    """Without what is new each time."""
    if isinstance(answer, Claim):
        return [lease.delivery_id for lease in answer.leases], answer.next_due, answer.endpoints_revision
    if _settled(answer):
        return [settled.held for settled in answer]
    return answer
