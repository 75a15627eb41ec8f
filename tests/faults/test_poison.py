"""Payloads and parts of the application's that mean harm, or were not thought of: neighbours never notice."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import Content, Dispatcher, Profile, RetryPolicy, StandardWebhooks, ValidationFailed
from hookwright.testing import FakeTransport
from tests.conftest import URL

if TYPE_CHECKING:
    from collections.abc import Callable


def _deep() -> object:
    data: Any = []
    for _ in range(100_000):
        data = [data]
    return data


def _endless() -> object:
    data: list[Any] = []
    data.append(data)
    return data


class Unprintable:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


POISON: dict[str, Callable[[], object]] = {
    "too deep": _deep,
    "itself": _endless,
    "not a number": lambda: {"n": float("nan")},
    "infinite": lambda: [float("inf")],
    "half a surrogate": lambda: "\ud800",
    "a lock": threading.Lock,
    "unprintable": Unprintable,
    "a class": lambda: Unprintable,
    "too large": lambda: "x" * 300_000,
    "a generator that raises": lambda: (1 / 0 for _ in range(1)),
}


@pytest.mark.parametrize("name", POISON)
async def test_what_cannot_be_an_event_is_refused_and_the_next_one_is_delivered(storage_url: str, name: str) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        with pytest.raises(ValidationFailed, match="data"):
            await dispatcher.emit("video.ready", POISON[name]())
        await dispatcher.emit("video.ready")
        await dispatcher.drain()
        assert len(transport.requests) == 1
        assert (await dispatcher.health()).state == "healthy"


@pytest.mark.parametrize(
    "data",
    [
        {"\u0000": "\u0000", "\u202e": "\u2028\u2029"},
        {"__proto__": {"constructor": None}, "": [[[[]]]]},
        "'; DROP TABLE hookwright_event; --",
        {"n": 10**400, "f": 1e-320, "t": True},
        ["x" * 200_000],
    ],
    ids=["control characters", "names of methods", "SQL", "numbers", "long"],
)
async def test_odd_data_arrives_as_it_was_given(storage_url: str, data: object) -> None:
    transport = FakeTransport()
    async with Dispatcher(storage_url, transport=transport) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.emit("video.ready", data)
        await dispatcher.drain()
        [request] = transport.requests
        assert json.loads(request.body)["data"] == data


class Poisoned:
    """Parts of the application's that fail for one event alone."""

    def render(self, content: Content) -> bytes:
        if b"poison" in content.data:
            raise RecursionError("maximum recursion depth exceeded")
        return bytes(content.data)


async def test_an_event_that_an_envelope_cannot_render_fails_alone(storage_url: str) -> None:
    transport = FakeTransport()
    profiles = {"default": Profile(envelope=Poisoned(), signers=[StandardWebhooks()], retry=RetryPolicy.schedule(0, 0))}
    async with Dispatcher(storage_url, transport=transport, profiles=profiles) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
        for number in range(10):
            await dispatcher.emit("video.ready", "poison" if number == 4 else number)
        await dispatcher.drain()
        assert len(transport.requests) == 9
        [failed] = await dispatcher.deliveries.list(status="failed")
        assert (failed.last_error, failed.attempt_count) == ("render_error", 1)
        assert (await dispatcher.health()).state == "healthy"
