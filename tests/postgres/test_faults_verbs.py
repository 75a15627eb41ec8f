"""Each verb, cut at every statement boundary: its effect is there whole or not at all, and it can be given again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest

from hookwright import CommitLost, DeliveryState, HookwrightError, StorageUnavailable
from hookwright._models import AttemptRecord, Claim, Emission, EndpointState, Settled
from hookwright.storage._base import ClaimRequest, DeliveryFilter
from hookwright.storage.postgres import _emits, _listener, _turns
from tests.conftest import until
from tests.postgres.cutting import Cut, Scene, idle, outcome, scene, tasks, waiting
from tests.postgres.manual import remember_types
from tests.postgres.proxy import Action

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from hookwright._models import Lease
    from hookwright.storage.postgres import PostgresStorage

LEASE = 60_000_000
EVERYTHING = DeliveryFilter()
REQUEST = ClaimRequest(9, 9, LEASE, 4, {})


def _event(scene: Scene, number: int = 1) -> tuple[Any, list[Any]]:
    event = scene.world.new_event(id=f"evt_new_{number}", idempotency_key=f"key {number}")
    return event, [scene.world.new_delivery(scene.endpoint.id)._replace(id=f"dlv_new_{number}")]


def _settle(scene: Scene) -> Awaitable[Any]:
    retry = scene.world.outcome(scene.other, DeliveryState.PENDING, retry_in=LEASE)
    return scene.storage.settle([scene.world.outcome(scene.one, DeliveryState.FAILED, gone=True), retry])


def _record_test(scene: Scene) -> Awaitable[Any]:
    record = AttemptRecord(scene.world.clock.now(), 5, status=204)
    return scene.storage.record_test(Emission(*_event(scene)), DeliveryState.SUCCEEDED, record)


def _settle_successes(scene: Scene) -> Awaitable[Any]:
    return scene.storage.settle([scene.world.outcome(lease) for lease in (scene.one, scene.other)])


WRITES: dict[str, Callable[[Scene], Awaitable[Any]]] = {
    "acquire": lambda scene: scene.storage.acquire(),
    "enqueue": lambda scene: scene.storage.enqueue(*_event(scene), endpoints_revision=4),
    "enqueue_many": lambda scene: scene.storage.enqueue_many(
        [Emission(*_event(scene, 1)), Emission(*_event(scene, 2))], endpoints_revision=4
    ),
    "claim": lambda scene: scene.storage.claim(REQUEST),
    "settle": _settle,
    "settle_successes": _settle_successes,
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
    "expunge": lambda scene: scene.world.expunge(scene.waiting.event_id),
    "prune": lambda scene: scene.storage.prune(scene.world.clock.now() + 1),
}

READS: dict[str, Callable[[Scene], Awaitable[Any]]] = {  # all others are one statement in a transaction, too
    "get_endpoint": lambda scene: scene.storage.get_endpoint(scene.endpoint.id),
    "list_deliveries": lambda scene: scene.storage.list_deliveries(EVERYTHING, limit=9, cursor=None),
    "backlog": lambda scene: scene.storage.backlog(),
}

VERBS = WRITES | READS

SINGLE = {"enqueue", "claim", "settle_successes"}
"""These are one statement, which is its own commit; others have a BEGIN, a statement at least, and a COMMIT."""

SCENES = 4
"""A scene serves several verbs: building it takes longer than cutting most of them."""


@pytest.mark.parametrize("number", range(SCENES))
async def test_verbs_cut_at_any_statement_are_there_whole_or_not_at_all(
    postgres_dsn: str, postgres_schema: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_listener, "PING_INTERVAL", 3600.0)  # each wait of it is a task, which no verb left behind
    monkeypatch.setattr(_emits, "NOTIFY_INTERVAL", 0.0)  # others are told in the transaction, and not in one after it
    remember_types(monkeypatch)
    async with scene(postgres_dsn, postgres_schema) as setting:
        for name in list(VERBS)[number::SCENES]:
            await _cut_everywhere(name, _Cutting(setting, VERBS[name], single=name in SINGLE))


async def _cut_everywhere(name: str, cutting: _Cutting) -> None:
    await cutting.count()
    for action in (Action.CUT_BEFORE, Action.CUT_AFTER):
        assert await cutting.strike(0, action), name
        # Nothing was asked for yet: verbs that are given again by themselves are, others say that nothing was done.
        assert not isinstance(cutting.answer, CommitLost), name
        number, lost = 1, 0
        while await cutting.strike(number, action):
            lost += isinstance(cutting.answer, CommitLost)
            number += 1
        least = 2 if action is Action.CUT_AFTER else 3
        assert number - 1 == 1 if name in SINGLE else number - 1 >= least, name
        # What commits was cut: emits find out what became of it, other writes say that they do not know.
        assert lost == (name in WRITES and not name.startswith("enqueue")), name


async def test_a_claim_that_is_done_late_is_given_back_without_an_interruption(
    postgres_dsn: str, postgres_schema: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is gone, and the server still works on it when the next claim looks for what it left."""
    monkeypatch.setattr(_turns, "_LATE_LOOK", 0.01)
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, other = setting.storage, setting.direct.connection
        wake = f"{postgres_schema}.wake"
        between = await asyncpg.connect(postgres_dsn)
        await _settle_successes(setting)  # one is left that is due
        await other.execute(f"BEGIN; LOCK TABLE {wake} IN ACCESS EXCLUSIVE MODE")
        late = asyncio.ensure_future(storage.claim(REQUEST))
        await until(lambda: waiting(other, wake, 1))
        in_line = asyncio.ensure_future(between.execute(f"BEGIN; LOCK TABLE {wake} IN ACCESS EXCLUSIVE MODE"))
        await until(lambda: waiting(other, wake, 2))
        setting.proxy.reset()
        with pytest.raises(CommitLost):
            await late
        empty = asyncio.ensure_future(storage.claim(REQUEST))
        await until(lambda: waiting(other, wake, 3))
        await other.execute("COMMIT")
        await in_line  # the late one is done, and the other has not begun
        await between.close()
        assert (await empty).leases == []  # the late one has them
        [lease] = await _claimed(storage)
        assert (lease.number, lease.interruptions, lease.taken_over) == (1, 0, False)
        assert storage._open is not None
        assert not storage._open.turns._late  # it is not looked for any more


async def _claimed(storage: PostgresStorage) -> list[Lease]:
    found: list[Lease] = []

    async def claims() -> bool:
        found.extend((await storage.claim(REQUEST)).leases)
        return bool(found)

    await until(claims)
    return found


async def test_a_settle_that_is_done_late_is_counted_once(postgres_dsn: str, postgres_schema: str) -> None:
    async with scene(postgres_dsn, postgres_schema) as setting:
        storage, other = setting.storage, setting.direct.connection
        outcomes = [setting.world.outcome(lease) for lease in (setting.one, setting.other)]
        await other.execute(f"BEGIN; SELECT 1 FROM {postgres_schema}.lane FOR UPDATE")
        late = asyncio.ensure_future(storage.settle(outcomes))
        await until(lambda: waiting(other, None, 1))
        setting.proxy.reset()
        with pytest.raises(CommitLost):
            await late
        again = asyncio.ensure_future(storage.settle(outcomes))
        await until(lambda: waiting(other, None, 2))
        await other.execute("COMMIT")
        assert [settled.held for settled in await again] == [True, True]
        for lease in (setting.one, setting.other):
            assert len(await storage.attempts(lease.delivery_id)) == 1
            assert (await storage.get_delivery(lease.delivery_id)).attempt_count == 1
        assert [settled.held for settled in await storage.settle(outcomes)] == [False, False]


class _Cutting:
    def __init__(self, scene: Scene, verb: Callable[[Scene], Awaitable[Any]], *, single: bool) -> None:
        self._scene = scene
        self._single = single
        self._verb = verb
        self._expected: Any = None
        self._untouched: Any = None
        self._done: Any = None
        self.answer: Any = None

    async def count(self) -> None:
        """See what it does where nothing is cut."""
        await self._put_back()
        self._untouched = await self._scene.direct.dump()
        self._expected = await self._run()
        self._done = await self._scene.direct.dump()

    async def _run(self) -> Any:
        self._scene.storage._freed = False  # so that `acquire` does what it does
        self._scene.storage._pruned = (0, "")
        return _plain(await outcome(self._verb(self._scene), HookwrightError))

    async def _put_back(self) -> None:
        await self._scene.direct.restore()
        assert self._scene.storage._open is not None
        turns = self._scene.storage._open.turns
        for known in (turns._unknown, turns._lost, turns._late):
            known.clear()

    async def strike(self, number: int, action: Action) -> bool:
        """Cut at that statement, or while it connects (0); False when it was passed untouched."""
        scene = self._scene
        await self._put_back()
        assert scene.storage._open is not None
        if number == 0:
            for pool in scene.storage._open.pool._pools or ():
                await pool.expire_connections()
        cut = scene.proxy.on_message = Cut(scene.proxy, number, action, single=self._single)
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
