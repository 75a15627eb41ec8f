"""Histories drawn from seeds, the proof that a seed says everything, and the proof that the model can say no."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import pytest

from hookwright import DeliveryState, Failure, MemoryStorage, StorageError
from hookwright._delivery import Deliverer
from hookwright._matching import CachedEndpoint, EndpointCache, SubscriptionIndex
from hookwright._worker import Worker
from tests.simulation._port import Port
from tests.simulation._simulate import simulate
from tests.simulation._world import Parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hookwright import Request, Response, Secret, Transport
    from hookwright._health import HealthPolicy
    from hookwright._models import Claim, EventRow, Lease, NewDelivery, Outcome, Receipt, Settled
    from hookwright.storage._base import ClaimRequest

ROOT = Path(__file__).parents[2]
CHUNK = 25
FEW = 60


@pytest.mark.parametrize("first", range(1, 201, CHUNK))
def test_every_promise_is_kept_whatever_happens(first: int) -> None:
    for seed in range(first, first + CHUNK):
        trace = simulate(seed)
        assert trace.failure is None, f"seed {seed}: {trace.failure}\n    {trace.command}"


def test_the_histories_hold_what_they_are_drawn_for() -> None:
    traces = [simulate(seed) for seed in range(1, 11)]
    for name in ("deliveries", "requests", "repeats", "crashes", "faults"):
        assert sum(trace.figures[name] for trace in traces) > 0, name


# -- a seed says everything -------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_history_and_another_one_another() -> None:
    assert simulate(7).lines == simulate(7).lines
    assert simulate(7).lines != simulate(8).lines


def test_a_history_is_the_same_in_another_process_with_other_hashes() -> None:
    seed = 31

    def told(hash_seed: str) -> str:
        command = [sys.executable, "-m", "tests.simulation", "--seed", str(seed)]
        environment = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT / "src")}
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=60
        ).stdout

    first = told("1")
    assert first == told("2")
    assert "\n".join(simulate(seed).lines) in first


# -- the model can say no ---------------------------------------------------------------------------------------


class Forgetful(MemoryStorage):
    """Forgets one row of what it acknowledged."""

    async def enqueue(self, event: EventRow, deliveries: Sequence[NewDelivery], **options: Any) -> Receipt:
        receipt = await super().enqueue(event, deliveries, **options)
        for row in self._event_rows[receipt.event_id][1:]:
            self._rows.pop(row.id, None)
        return receipt


class Credulous(MemoryStorage):
    """Settles whatever token it is shown."""

    async def settle(self, outcomes: Sequence[Outcome], *policy: HealthPolicy) -> list[Settled]:
        rows = [self._rows.get(outcome.delivery_id) for outcome in outcomes]
        stands = [
            outcome if row is None or row.token is None else outcome._replace(token=row.token)
            for row, outcome in zip(rows, outcomes, strict=True)
        ]
        for row, outcome in zip(rows, outcomes, strict=True):
            if row is not None and row.token is None:
                row.token = outcome.token
        return await super().settle(stands, *policy)


class Hasty(MemoryStorage):
    """Claims from lanes that are held, paused ones among them."""

    async def claim(self, request: ClaimRequest) -> Claim:
        for lane in self._lanes.values():
            lane.hold_until = 0
        return await super().claim(request)


class Greedy(MemoryStorage):
    """Counts what was given back against the retry policy."""

    async def release(self, leases: Sequence[Lease], *, sent: bool = False, hold: int = 0) -> None:
        await super().release(leases, sent=sent, hold=hold)
        for lease in leases if sent else ():
            self._rows[lease.delivery_id].budget_from -= 1


class Stubborn(MemoryStorage):
    """Never tells that an endpoint answered 410."""

    async def settle(self, outcomes: Sequence[Outcome], *policy: HealthPolicy) -> list[Settled]:
        return await super().settle([outcome._replace(gone=False) for outcome in outcomes], *policy)


class Hopeful(MemoryStorage):
    """Tries again what has used up its attempts."""

    async def settle(self, outcomes: Sequence[Outcome], *policy: HealthPolicy) -> list[Settled]:
        kept = [
            outcome._replace(state=DeliveryState.PENDING) if outcome.state is DeliveryState.FAILED else outcome
            for outcome in outcomes
        ]
        return await super().settle(kept, *policy)


class Grudging(MemoryStorage):
    """Keeps the leases of the dead."""

    async def acquire(self) -> bool:
        self._acquired = True
        return True


class Crowded(MemoryStorage):
    """Does not count what is in flight."""

    async def claim(self, request: ClaimRequest) -> Claim:
        return await super().claim(request._replace(in_flight={}))


class Echo:
    """Sends everything twice."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner

    async def send(self, request: Request) -> Response | Failure:
        await self._inner.send(request)
        return await self._inner.send(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


class Liar(Echo):
    """Says that what was refused was accepted."""

    async def send(self, request: Request) -> Response | Failure:
        answer = await self._inner.send(request)
        return answer if isinstance(answer, Failure) else answer._replace(status=200)


class Meddler(Echo):
    """Changes what was signed."""

    async def send(self, request: Request) -> Response | Failure:
        return await self._inner.send(request._replace(body=request.body + b" "))


BROKEN: dict[str, Parts] = {
    "a row of an acknowledged event is forgotten": Parts(storage=Forgetful),
    "stale tokens settle": Parts(storage=Credulous),
    "paused endpoints are claimed from": Parts(storage=Hasty),
    "shutdowns cost attempts": Parts(storage=Greedy),
    "410 does not disable": Parts(storage=Stubborn),
    "spent deliveries are tried again": Parts(storage=Hopeful),
    "leases of the dead are kept": Parts(storage=Grudging),
    "what is in flight takes no room": Parts(storage=Crowded),
    "everything is sent twice": Parts(around=Echo),
    "refusals are recorded as successes": Parts(around=Liar),
    "bodies are changed after they were signed": Parts(around=Meddler),
}


def found(parts: Parts | None = None) -> str:
    """Return what is wrong with the first seed that shows it."""
    for seed in range(1, FEW + 1):
        trace = simulate(seed, parts=parts)
        if trace.failure is not None:
            return trace.failure
    return ""


@pytest.mark.parametrize("parts", [pytest.param(parts, id=name) for name, parts in BROKEN.items()])
def test_broken_parts_are_found_within_a_few_seeds(parts: Parts) -> None:
    assert found(parts)


_call = Port.call
_sulking: WeakSet[Port] = WeakSet()


async def _sulks(port: Port, name: str, arguments: Any, options: Any) -> Any:
    if name == "claim" and port in _sulking:
        await asyncio.Event().wait()
    try:
        return await _call(port, name, arguments, options)
    except StorageError:
        _sulking.add(port)
        raise


async def _not_refreshed(worker: Worker, claim: Claim) -> None:
    return None


async def _matches_nothing_new(cache: EndpointCache, seen: int) -> bool:
    cache.revision = max(cache.revision, (await cache._storage.changes(seen)).revision)
    return False


def _all_secrets(endpoint: CachedEndpoint, now: int) -> list[Secret]:
    return [secret for secret, _ in endpoint.secrets]


MUTATIONS: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "a worker that never claims again after an error": (Port, "call", _sulks),
    "a worker that sends what it knew before an endpoint changed": (Worker, "_refresh_endpoints", _not_refreshed),
    "a worker that is not told of new events": (Worker, "wake", lambda worker: None),
    "a worker that sends on leases about to end": (Deliverer, "_lease_covers", lambda deliverer, lease, request: True),
    "secrets that never end": (CachedEndpoint, "live_secrets", _all_secrets),
    "matching that does not look at tenants": (SubscriptionIndex, "_key", lambda index, tenant, pattern: pattern),
    "an emitter that does not see new endpoints": (EndpointCache, "refresh", _matches_nothing_new),
}


@pytest.mark.parametrize("mutation", [pytest.param(mutation, id=name) for name, mutation in MUTATIONS.items()])
def test_broken_workers_are_found_within_a_few_seeds(
    mutation: tuple[type, str, Callable[..., Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*mutation)
    assert found()
