"""The lane law as a property: a lane may be early, never late. Checked step by step against a plain model."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import given, settings
from hypothesis import strategies as st

from hookwright._clock import FOREVER, SECOND
from hookwright._models import DeliveryState, EndpointState
from hookwright.storage._base import ClaimRequest, DeliveryFilter
from hookwright.testing._storage_contract_base import LEASE, ContractBase

if TYPE_CHECKING:
    from hookwright._models import Claim, Lease
    from hookwright.testing._storage_contract_base import World

_PENDING = DeliveryFilter(states=(DeliveryState.PENDING,))
CAP = 4
CONCURRENCIES = (None, 1, 2, None, None, None)
_SETTLED = [DeliveryState.SUCCEEDED] * 3 + [DeliveryState.FAILED, DeliveryState.PENDING]

_endpoint = st.integers(0, len(CONCURRENCIES) - 1)
_lease = st.integers(0, 200)
_delay = st.sampled_from([0, 0, 0, SECOND, 30 * SECOND])
_emit = st.tuples(st.just("emit"), st.lists(_endpoint, min_size=1, max_size=6), _delay)
_claim = st.tuples(
    st.just("claim"), st.sampled_from([1, 1, 2, 3, 9]), st.sampled_from([0, 1, 2, 9, 9]), st.sets(_endpoint, max_size=2)
)
_settle = st.tuples(st.just("settle"), _lease, st.sampled_from(_SETTLED), _delay)
_advance = st.tuples(st.just("advance"), st.sampled_from([SECOND // 100, SECOND, 25 * SECOND, LEASE]))
_operation = st.one_of(
    _emit,
    _claim,
    _claim,
    _claim,
    _settle,
    _settle,
    _advance,
    st.tuples(st.just("release"), _lease, st.booleans(), st.sampled_from([0, 0, 20 * SECOND])),
    st.tuples(st.just("lose"), _lease),
    st.tuples(st.just("set_state"), _endpoint, st.sampled_from([EndpointState.ACTIVE, *EndpointState])),
    st.tuples(st.just("sweep")),
    st.tuples(st.just("restart")),
)
# Left to itself Hypothesis draws about five of them, which is too few to get a lane into trouble.
OPERATIONS = st.lists(_operation, max_size=60) | st.lists(_operation, min_size=30, max_size=90)


@dataclass
class ModelRow:
    """What the law says about a pending row."""

    endpoint: str
    created_at: int
    scheduled_at: int
    available_at: int
    token: str | None = None


@dataclass
class ModelLane:
    """What the law says about an endpoint's lane."""

    cap: int
    hold_until: int = 0
    earned: int = 0
    succeeded: bool = False
    stopped: bool = False


@dataclass
class Model:
    """The law, without storage: which rows are pending, and which of them a claim must bring."""

    lanes: dict[str, ModelLane] = field(default_factory=dict)
    rows: dict[str, ModelRow] = field(default_factory=dict)
    in_flight: dict[str, str] = field(default_factory=dict)

    def held(self) -> dict[str, list[str]]:
        """Return what this process works on, by endpoint."""
        held: dict[str, list[str]] = {}
        for row_id, endpoint in self.in_flight.items():
            held.setdefault(endpoint, []).append(row_id)
        return held

    def due(self, endpoint: str, now: int) -> list[str]:
        """Return the rows of a lane that could be claimed, the one that has been due longest first."""
        if self.lanes[endpoint].hold_until > now:
            return []
        due = [
            (row.available_at or row.created_at, row_id)
            for row_id, row in self.rows.items()
            if row.endpoint == endpoint and row.available_at <= now and row_id not in self.in_flight
        ]
        return [row_id for _, row_id in sorted(due)]

    def check(self, claim: Claim, request: ClaimRequest, now: int) -> None:
        """Assert that the claim brought as much as there is, and nothing else."""
        doubtful_rows = proven_rows = brought_doubtful = 0
        for endpoint, lane in self.lanes.items():
            due = self.due(endpoint, now)
            room = min(max(1, lane.earned), lane.cap) - len(request.in_flight.get(endpoint, ()))
            brought = [lease.delivery_id for lease in claim.leases if lease.endpoint_id == endpoint]
            assert brought == due[: len(brought)], "rows of a lane come in the order in which they became due"
            assert len(brought) <= max(0, room), "no more than the lane has room for"
            available = min(max(0, room), len(due))
            if lane.earned == 0 or endpoint in request.slow:
                doubtful_rows, brought_doubtful = doubtful_rows + available, brought_doubtful + len(brought)
            else:
                proven_rows += available
        assert brought_doubtful <= request.unproven_limit, "the half rule"
        expected = min(request.limit, proven_rows + min(doubtful_rows, request.unproven_limit))
        assert len(claim.leases) == expected, "a lane may be early, never late"

    def check_next_due(self, claim: Claim, now: int) -> None:
        """Assert that coming again at `next_due` is neither too late nor at once."""
        assert claim.next_due is None or now < claim.next_due < FOREVER
        opens = [max(self.lanes[row.endpoint].hold_until, row.available_at) for row in self.rows.values()]
        # A lane opens with its first row; one that is open already is not waited for.
        firsts = {row.endpoint: FOREVER for row in self.rows.values()}
        for row, time in zip(self.rows.values(), opens, strict=True):
            firsts[row.endpoint] = min(firsts[row.endpoint], time)
        later = [time for time in firsts.values() if now < time < FOREVER]
        if later:
            assert claim.next_due is not None
            assert claim.next_due <= min(later)


class Play:
    """Applies each operation to the storage and to the model."""

    def __init__(self, contract: ContractBase, world: World) -> None:
        self.contract = contract
        self.world = world
        self.model = Model()
        self.endpoints: list[str] = []
        self.leases: list[Lease] = []

    async def begin(self) -> None:
        """Create the endpoints."""
        for concurrency in CONCURRENCIES:
            endpoint = await self.world.endpoint(concurrency=concurrency)
            self.endpoints.append(endpoint)
            self.model.lanes[endpoint] = ModelLane(concurrency or CAP)

    async def emit(self, indexes: list[int], delay: int) -> None:
        """One event for some endpoints that are not disabled, some of them perhaps twice."""
        now = self.world.clock.now()
        endpoints = [self.endpoints[index] for index in indexes if not self.model.lanes[self.endpoints[index]].stopped]
        available_at = now + delay if delay else 0
        for row_id, endpoint in zip(
            await self.world.emit(*endpoints, available_at=available_at), endpoints, strict=True
        ):
            self.model.rows[row_id] = ModelRow(endpoint, now, available_at, available_at)

    async def claim(self, limit: int, unproven_limit: int, slow: set[int]) -> int:
        """Claim and check it; say how much it brought."""
        now, model = self.world.clock.now(), self.model
        slow_ids = {self.endpoints[index] for index in slow}
        request = ClaimRequest(limit, unproven_limit, LEASE, CAP, model.held(), slow_ids)
        claim = await self.world.storage.claim(request)
        model.check(claim, request, now)
        for lease in claim.leases:
            row = model.rows[lease.delivery_id]
            assert lease.taken_over == (row.token is not None)
            row.token, row.available_at = lease.token, lease.until
            model.in_flight[lease.delivery_id] = lease.endpoint_id
            self.leases.append(lease)
        model.check_next_due(claim, now)
        return len(claim.leases)

    def _pick(self, index: int) -> tuple[Lease, ModelRow | None] | None:
        """Return one of all leases ever given, the latest first, and its row if the token is still the row's."""
        if not self.leases:
            return None
        lease = self.leases[-1 - index % len(self.leases)]
        row = self.model.rows.get(lease.delivery_id)
        return lease, row if row is not None and row.token == lease.token else None

    async def settle(self, index: int, state: DeliveryState, delay: int) -> None:
        """Settle a lease, which may be stale."""
        picked = self._pick(index)
        if picked is None:
            return
        lease, row = picked
        settled = await self.world.settle(lease, state, retry_in=delay)
        assert settled.held == (row is not None)
        if row is None:
            return
        self.model.in_flight.pop(lease.delivery_id, None)
        lane = self.model.lanes[row.endpoint]
        lane.succeeded = state is DeliveryState.SUCCEEDED
        lane.earned = max(2, lane.earned * 2) if lane.succeeded else 0
        if state is DeliveryState.PENDING:
            row.token, row.available_at = None, self.world.clock.now() + delay
            row.scheduled_at = row.available_at
        else:
            del self.model.rows[lease.delivery_id]

    async def release(self, index: int, sent: bool, hold: int) -> None:
        """Give a lease back, which may be stale."""
        picked = self._pick(index)
        if picked is None:
            return
        lease, row = picked
        await self.world.storage.release([lease], sent=sent, hold=hold)
        if row is None:
            return
        self.model.in_flight.pop(lease.delivery_id, None)
        row.token, row.available_at = None, row.scheduled_at
        if hold:
            lane = self.model.lanes[row.endpoint]
            lane.hold_until = max(lane.hold_until, self.world.clock.now() + hold)

    async def lose(self, index: int) -> None:
        """Forget what is in flight, as if its process had died."""
        picked = self._pick(index)
        if picked is not None:
            self.model.in_flight.pop(picked[0].delivery_id, None)

    async def set_state(self, index: int, state: EndpointState) -> None:
        """Pause, disable or activate."""
        endpoint = self.endpoints[index]
        await self.world.storage.set_endpoint_state(endpoint, state, reason=None)
        lane = self.model.lanes[endpoint]
        lane.hold_until = 0 if state is EndpointState.ACTIVE else FOREVER
        lane.stopped = state is EndpointState.DISABLED

    async def sweep(self) -> None:
        """Sweep what is left of disabled endpoints."""
        await self.world.sweep()
        now = self.world.clock.now()
        for row_id, row in list(self.model.rows.items()):
            if self.model.lanes[row.endpoint].stopped and (row.token is None or row.available_at <= now):
                assert await self.world.state(row_id) is DeliveryState.SKIPPED
                del self.model.rows[row_id]

    async def advance(self, microseconds: int) -> None:
        """Let time pass."""
        self.world.pass_time(microseconds)

    async def restart(self) -> None:
        """Die, and come back."""
        await self.contract.restart(self.world)
        self.model.in_flight.clear()
        for lane in self.model.lanes.values():
            lane.earned = int(lane.succeeded)
        for row in self.model.rows.values():
            row.available_at = row.available_at if row.token is None else 0

    async def finish(self) -> None:
        """Open every lane: all that is pending must come."""
        for index in range(len(self.endpoints)):
            await self.set_state(index, EndpointState.ACTIVE)
        self.model.in_flight.clear()
        while self.model.rows:
            await self.advance(2 * LEASE)
            assert await self.claim(1, 1, set()) == 1
            await self.settle(0, DeliveryState.FAILED, 0)
        assert await self.world.storage.count_deliveries(_PENDING) == 0


class LaneLawContract(ContractBase):
    """Whenever a row is due, its lane open and with room, a claim brings it."""

    def test_a_lane_may_be_early_but_is_never_late(self) -> None:
        @settings(max_examples=60, deadline=None, derandomize=True, database=None)
        @given(OPERATIONS)
        def property_of(operations: list[tuple[Any, ...]]) -> None:
            asyncio.run(self._play(operations))

        property_of()

    async def _play(self, operations: list[tuple[Any, ...]]) -> None:
        async with self.opened() as world:
            play = Play(self, world)
            await play.begin()
            for name, *arguments in operations:
                await getattr(play, name)(*arguments)
            await play.finish()
