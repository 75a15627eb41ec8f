"""The cache of endpoints: what an event looks at, what a change makes of it, and what is found out at once."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from hookwright import ALL_TENANTS, Dispatcher, EncryptionKey, SQLiteStorage
from hookwright import _matching as matching
from hookwright._clock import to_datetime
from hookwright._matching import EndpointCache, SubscriptionIndex
from hookwright._models import EndpointRow, EndpointState, Key
from hookwright._snapshot import term
from hookwright._vault import Vault
from hookwright.storage._base import Changes
from hookwright.storage.memory import MemoryStorage
from hookwright.storage.sqlite import _endpoints
from hookwright.testing import FakeTransport, VirtualClock
from tests.conftest import until
from tests.test_encryption import is_signed

if TYPE_CHECKING:
    from pathlib import Path

    from hookwright._models import Tenant
    from hookwright._snapshot import Scalar

URL = "https://receiver.example/"
NOTHING: frozenset[str] = frozenset()


def row(number: int, *events: str, tenant: Tenant = None, revision: int = 1, **rest: object) -> EndpointRow:
    return EndpointRow(f"ep_{number}", URL, events, 0, 0, (Key("secret"),), tenant=tenant, revision=revision, **rest)  # type: ignore[arg-type]  # the rest is what a test says


class Scripted(MemoryStorage):
    """Answers `changes` with what a test says."""

    def __init__(self, *answers: Changes) -> None:
        super().__init__()
        self.answers = list(answers)
        self.asked: list[int] = []

    async def changes(self, since_revision: int) -> Changes:
        self.asked.append(since_revision)
        return self.answers.pop(0)


async def cache_of(*answers: Changes, keys: tuple[EncryptionKey, ...] = ()) -> EndpointCache:
    cache = EndpointCache(Scripted(*answers), Vault(keys))
    await cache.refresh(-1)
    return cache


# -- what an event looks at -------------------------------------------------------------------------------------


def test_an_event_looks_at_its_own_tenants_endpoints_and_at_those_of_all_tenants() -> None:
    index = SubscriptionIndex()
    for number in range(1000):
        index.add(f"ep_{number}", f"tenant {number}", ("video.*", "export.ready"))
    index.add("everyone", ALL_TENANTS, ("video.*",))
    index.add("nobody's", None, ("video.*",))
    assert list(index.find("video.ready", "tenant 7")) == ["ep_7", "everyone"]
    assert list(index.find("video.ready", None)) == ["nobody's", "everyone"]
    assert list(index.find("video.ready", "tenant 1000")) == ["everyone"]
    assert list(index.find("export.ready", "tenant 7")) == ["ep_7"]


def test_an_event_does_not_look_at_endpoints_that_want_other_types() -> None:
    index = SubscriptionIndex()
    for number in range(1000):
        index.add(f"ep_{number}", None, (f"type.{number}",))
    assert list(index.find("type.7", None)) == ["ep_7"]


def test_an_endpoint_whose_patterns_all_match_is_found_once() -> None:
    index = SubscriptionIndex()
    index.add("ep", "t", ("*", "video.*", "video.ready"))
    index.add("other", "t", ("video.*", "video.ready"))
    assert list(index.find("video.ready", "t")) == ["ep", "other"]


def test_a_tenant_called_like_all_tenants_is_one_of_them_only() -> None:
    index = SubscriptionIndex()
    index.add("star", "*", ("a",))
    index.add("everyone", ALL_TENANTS, ("a",))
    assert list(index.find("a", "t")) == ["everyone"]
    assert list(index.find("a", "*")) == ["star", "everyone"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_endpoints_leave_the_index_without_a_trace(count: int) -> None:
    index = SubscriptionIndex()
    for number in range(count):
        index.add(f"ep_{number}", None, ("a", "b.*"))
    for number in range(count):
        assert len(index.find("a", None)) == count - number
        index.discard(f"ep_{number}", None, ("a", "b.*"))
    assert not index._one
    assert not index._several


# -- what a change makes of it ----------------------------------------------------------------------------------


async def test_an_endpoint_that_changes_tenant_patterns_or_filters_is_found_by_the_new_ones_only() -> None:
    cache = await cache_of(
        Changes(1, [row(1, "a", "b.*", tenant="t")]),
        Changes(2, [row(1, "c", tenant="u", filters={"index": ("x",)}, revision=2)]),
        Changes(3, [row(1, "c", tenant=ALL_TENANTS, revision=3)]),
    )
    assert cache.match("a", "t", NOTHING) == cache.match("b.x", "t", NOTHING) == ["ep_1"]
    await cache.refresh(1)
    assert cache.match("a", "t", NOTHING) == cache.match("b.x", "t", NOTHING) == cache.match("c", "u", NOTHING) == []
    assert cache.match("c", "u", frozenset({term("index", "x")})) == ["ep_1"]
    await cache.refresh(2)
    assert cache.match("c", "u", NOTHING) == cache.match("c", None, NOTHING) == ["ep_1"]


@pytest.mark.parametrize("count", [1, 2, 8, 9, 500])
async def test_filters_are_found_by_each_of_their_values_however_many_and_read_as_they_were_given(count: int) -> None:
    values: tuple[Scalar, ...] = (1, *(f'v\n"{number}' for number in range(count - 1)))
    filters = {"size: \t": values, "plan": ("pro",)}
    cache = await cache_of(Changes(1, [row(1, "a", filters=filters)]))
    plan = term("plan", "pro")
    for value in values:
        assert cache.match("a", None, frozenset({plan, term("size: \t", value)})) == ["ep_1"]
    others: tuple[Scalar, ...] = (True, "1", "v", 2)
    for other in others:
        assert cache.match("a", None, frozenset({plan, term("size: \t", other)})) == []
    for terms in (NOTHING, {plan}, {term("size: \t", 1)}, {term("size: \t", 1), term("plan", "team")}):
        assert cache.match("a", None, frozenset(terms)) == []
    assert {key: set(found) for key, found in cache.filters("ep_1").items()} == {
        key: set(allowed) for key, allowed in filters.items()
    }


async def test_a_deleted_endpoint_leaves_nothing_behind() -> None:
    told = row(1, "a", filters={"index": ("x",)}, state=EndpointState.DISABLED)
    gone = EndpointRow("ep_1", "", (), 0, 0, state=EndpointState.DISABLED, deleted=True, revision=2)
    cache = await cache_of(Changes(1, [told]), Changes(2, [gone]))
    assert cache.get("ep_1") is not None
    assert cache.is_disabled("ep_1")
    assert await cache.refresh(1)  # one has stopped
    assert (cache.get("ep_1"), cache.row("ep_1"), cache.all(), cache.is_disabled("ep_1")) == (None, None, [], False)
    assert (cache._hot, cache._filters, cache.match("a", None, NOTHING)) == ({}, {}, [])


async def test_what_is_sent_is_as_it_was_stored() -> None:
    stored = row(
        1,
        "a",
        "b.*",
        tenant=ALL_TENANTS,
        name="n",
        headers=(("X-A", "1"), ("X-B", "ü")),
        profile="p",
        concurrency=3,
        timeout=2.5,
        state=EndpointState.PAUSED,
    )
    cached = (await cache_of(Changes(1, [stored]))).get("ep_1")
    assert cached is not None
    assert cached.row == stored
    assert [(secret.reveal(), until) for secret, until in cached.secrets] == [("secret", None)]


async def test_a_rotated_secret_signs_at_once_and_the_endpoint_stays_ready_until_then(tmp_path: Path) -> None:
    transport = FakeTransport()
    async with Dispatcher(f"sqlite:///{tmp_path}/hooks.db", transport=transport, keys=[]) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        for _ in range(2):
            await dispatcher.emit("a")
            await dispatcher.drain()
        ready = dispatcher._cache.get(endpoint.id)
        assert dispatcher._cache.get(endpoint.id) is ready
        rotated = await dispatcher.endpoints.rotate_secret(endpoint.id)
        await dispatcher.emit("a")
        await dispatcher.drain()
        assert dispatcher._cache.get(endpoint.id) is not ready
    assert [is_signed(request, rotated.secret) for request in transport.requests] == [False, False, True]


async def test_only_so_many_endpoints_are_kept_ready_those_that_were_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "HOT_MOST", 2)
    cache = await cache_of(Changes(1, [row(number, "a") for number in range(3)]))
    ready = {number: cache.get(f"ep_{number}") for number in (0, 1)}
    assert cache.get("ep_0") is ready[0]
    cache.get("ep_2")
    assert list(cache._hot) == ["ep_0", "ep_2"]
    assert cache.get("ep_1") is not ready[1]


# -- what is read, and when it counts ---------------------------------------------------------------------------


async def test_endpoints_that_cannot_be_opened_are_named_before_they_are_used_and_until_they_change() -> None:
    lost, key = EncryptionKey.generate("lost"), EncryptionKey.generate("new")
    sealed = Vault([lost]).sealed(row(1, "a"))
    cache = await cache_of(
        Changes(2, [sealed, Vault([key]).sealed(row(2, "a"))]), Changes(3, [row(1, "a", revision=3)]), keys=(key,)
    )
    assert list(cache.broken) == ["ep_1"]
    assert "key 'lost'" in cache.broken["ep_1"]
    broken = cache.get("ep_1")
    assert broken is not None
    assert (broken.secrets, broken.row.keys, broken.broken) == ((), (), cache.broken["ep_1"])
    await cache.refresh(2)
    assert cache.broken == {}
    mended = cache.get("ep_1")
    assert mended is not None
    assert mended.broken is None


async def test_a_long_change_lets_others_run_and_counts_once_it_is_known_whole() -> None:
    pages = [Changes(1000, [row(n, "a", revision=n) for n in range(1, 1001)], more=True), Changes(1001, [])]
    cache = EndpointCache(Scripted(*pages), Vault())
    seen: list[tuple[int, int]] = []

    async def look() -> None:
        while cache.revision < 0:
            seen.append((cache.revision, len(cache.match("a", None, NOTHING))))
            await asyncio.sleep(0)

    await asyncio.gather(look(), cache.refresh(-1))
    assert {revision for revision, _ in seen} == {-1}
    assert {count for _, count in seen} == set(range(0, 1000, matching._AT_ONCE))
    assert (cache.revision, len(cache.match("a", None, NOTHING))) == (1001, 1000)


async def test_many_changes_are_read_page_by_page_from_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_endpoints, "CHANGES_MOST", 3)
    async with Dispatcher(SQLiteStorage(tmp_path / "hooks.db"), transport=FakeTransport(), keys=[]) as dispatcher:
        made = [await dispatcher.endpoints.create(URL, events=["*"]) for _ in range(7)]
        await dispatcher.endpoints.delete(made[2].id)
        first = await dispatcher._storage.changes(0)
        assert ([row.id for row in first.endpoints], first.revision, first.more) == (
            [made[number].id for number in (0, 1, 3)],
            4,
            True,
        )
        last = await dispatcher._storage.changes(5)
        assert ([row.id for row in last.endpoints], last.revision, last.more) == (
            [made[number].id for number in (5, 6, 2)],
            8,
            False,
        )
        assert (await dispatcher.emit("a")).delivery_count == 6


class Slow(MemoryStorage):
    """Reads what changed at once, and answers when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.reading = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def changes(self, since_revision: int) -> Changes:
        found = await super().changes(since_revision)
        self.reading += 1
        await self.may_answer.wait()
        return found


@pytest.mark.parametrize("way", ["claim", "test"])
async def test_what_was_read_before_a_change_is_not_taken_for_it(way: str) -> None:
    storage, transport, clock = Slow(), FakeTransport(), VirtualClock()
    async with Dispatcher(storage, transport=transport, clock=clock, keys=[]) as dispatcher:
        one = await dispatcher.endpoints.create(URL + "old", events=["video"])
        other = await dispatcher.endpoints.create(URL, events=["export"])
        await dispatcher.emit("video", deliver_at=to_datetime(clock.now()) + timedelta(seconds=10))
        storage.may_answer.clear()
        await dispatcher.endpoints.update(other.id, name="a change")
        reading = storage.reading
        emitting = asyncio.ensure_future(dispatcher.emit("nobody.wants.it"))  # which reads it
        await until(lambda: storage.reading > reading)
        await dispatcher.endpoints.update(one.id, url=URL + "new")
        if way == "claim":
            await clock.advance(10)
            testing = None
        else:
            testing = asyncio.ensure_future(dispatcher.endpoints.test(one.id))
        for _ in range(20):
            await asyncio.sleep(0)
        storage.may_answer.set()
        await emitting
        if testing is not None:
            await testing
        await until(lambda: transport.requests)
        assert transport.requests[0].url == URL + "new"
