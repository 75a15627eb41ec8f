"""Secrets and header values at rest: sealed under keys of the application's, never sent without, never to be read."""

from __future__ import annotations

import json
import logging
import sqlite3
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    ConflictError,
    Dispatcher,
    EncryptionKey,
    HexSignature,
    Profile,
    Response,
    Secret,
    StandardWebhooks,
)
from hookwright.receiver import VerificationFailed, Verifier
from hookwright.testing import FakeTransport
from tests.conftest import URL, until

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from hookwright import Endpoint, Request

OLD = EncryptionKey("old", b"o" * 32)
NEW = EncryptionKey("new", b"n" * 32)
OTHER_OLD = EncryptionKey("old", b"x" * 32)
HEADER = "Bearer MARKER-HEADER-03"
PROFILES = {
    "default": Profile(signers=[StandardWebhooks()]),
    "hex": Profile(signers=[HexSignature("X-Signature")]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hooks.db"


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


def opened(
    path: Path, keys: Sequence[EncryptionKey] | None, transport: FakeTransport | None = None, *, deliver: bool = True
) -> Dispatcher:
    return Dispatcher(
        f"sqlite:///{path}",
        keys=keys,
        profiles=PROFILES,
        transport=transport or FakeTransport(),
        shutdown_timeout=0,
        deliver=deliver,
    )


async def stored(path: Path, keys: Sequence[EncryptionKey] | None, **options: Any) -> Endpoint:
    """Return an endpoint that an earlier process created."""
    async with opened(path, keys) as dispatcher:
        return await dispatcher.endpoints.create(URL, events=["*"], **options)


def sql(path: Path, statement: str, *values: object) -> list[Any]:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        return connection.execute(statement, values).fetchall()
    finally:
        connection.close()


def texts(path: Path, endpoint_id: str) -> tuple[list[list[Any]], list[list[str]]]:
    """Return keys and headers as they are stored."""
    [(keys, headers)] = sql(path, "SELECT keys, headers FROM hookwright_endpoint WHERE id = ?", endpoint_id)
    return json.loads(keys), json.loads(headers)


def is_signed(request: Request, secret: Secret | None) -> bool:
    assert secret is not None
    try:
        Verifier(secret.reveal()).verify(request.body, dict(request.headers))
    except VerificationFailed:
        return False
    return True


# -- sending ----------------------------------------------------------------------------------------------------


async def test_what_was_sealed_is_sent_as_it_was_given_after_a_restart(path: Path, transport: FakeTransport) -> None:
    endpoint = await stored(path, [NEW], headers={"X-Token": HEADER})
    async with opened(path, [NEW], transport) as dispatcher:
        await dispatcher.emit("a", {"b": 1})
        await dispatcher.drain(timeout=10)
        [request] = transport.requests
        assert is_signed(request, endpoint.secret)
        assert ("X-Token", HEADER) in request.headers
        found = await dispatcher.endpoints.get(endpoint.id)
        assert (found.secret_last4, found.header_names) == (endpoint.secret_last4, ("X-Token",))
        assert endpoint.secret is not None
        assert found.secret_last4 == endpoint.secret.reveal()[-4:]


async def test_memory_seals_too_and_an_endpoint_is_sent_to_at_once(transport: FakeTransport) -> None:
    async with Dispatcher("memory:", keys=[NEW], transport=transport) as dispatcher:
        endpoint = await dispatcher.endpoints.create(URL, events=["*"], headers={"X-Token": HEADER})
        await dispatcher.endpoints.test(endpoint.id)
        rotated = await dispatcher.endpoints.rotate_secret(endpoint.id)
        await dispatcher.endpoints.update(endpoint.id, name="new")
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=10)
    first, second = transport.requests
    assert is_signed(first, endpoint.secret)
    assert is_signed(second, endpoint.secret)
    assert is_signed(second, rotated.secret)
    assert ("X-Token", HEADER) in second.headers


async def test_an_echoed_secret_is_blanked_and_a_payload_masked_as_without_keys(path: Path) -> None:
    secret = Secret.generate()
    transport = FakeTransport(lambda request: _echo(secret))
    async with opened(path, [NEW], transport) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"], secret=secret, headers={"X-Token": HEADER})
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=10)
        [delivery] = (await dispatcher.deliveries.list()).items
        [attempt] = await dispatcher.deliveries.attempts(delivery.id)
        assert attempt.response_text == "[secret] [secret]"
        payload = await dispatcher.deliveries.payload(delivery.id)
        assert dict(payload.headers)["X-Token"] == dict(payload.headers)["webhook-signature"] == "****"
        [match] = (await dispatcher.explain("a")).matches
        assert (dict(match.headers)["X-Token"], match.problem) == ("****", None)


def _echo(secret: Secret) -> Any:
    return Response(200, (), f"{secret.reveal()} {HEADER}".encode())


# -- keys that change -------------------------------------------------------------------------------------------


async def test_a_new_key_comes_first_reencrypts_and_then_the_old_one_may_go(
    path: Path, transport: FakeTransport
) -> None:
    endpoint = await stored(path, [OLD], headers={"X-Token": HEADER})
    async with opened(path, [NEW, OLD], transport) as dispatcher:
        assert {text.split(":")[2] for text in _flat(path, endpoint.id)} == {"old"}
        assert await dispatcher.endpoints.reencrypt() == 1
        assert await dispatcher.endpoints.reencrypt() == 0
        assert {text.split(":")[2] for text in _flat(path, endpoint.id)} == {"new"}
    async with opened(path, [NEW], transport) as dispatcher:
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=10)
        [request] = transport.requests
        assert is_signed(request, endpoint.secret)
        assert ("X-Token", HEADER) in request.headers


def _flat(path: Path, endpoint_id: str) -> list[str]:
    keys, headers = texts(path, endpoint_id)
    return [key[0] for key in keys] + [value for _, value in headers]


async def test_whatever_is_written_is_written_with_the_first_key(path: Path) -> None:
    endpoint = await stored(path, [OLD], headers={"X-Token": HEADER})
    async with opened(path, [NEW, OLD]) as dispatcher:
        await dispatcher.endpoints.pause(endpoint.id)
        assert {text.split(":")[2] for text in _flat(path, endpoint.id)} == {"old"}
        await dispatcher.endpoints.update(endpoint.id, name="renamed")
        assert {text.split(":")[2] for text in _flat(path, endpoint.id)} == {"new"}
        await dispatcher.endpoints.rotate_secret(endpoint.id)
        assert [text.split(":")[2] for text in _flat(path, endpoint.id)] == ["new"] * 3


async def test_without_the_key_a_delivery_is_held_and_named_and_goes_out_once_it_is_back(
    path: Path, transport: FakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = await stored(path, [OLD], headers={"X-Token": HEADER})
    for keys, says in (
        ([NEW], "its secret was sealed with the key 'old', which is not among keys="),
        ([], "its secret was sealed with the key 'old', which is not among keys="),
        ([OTHER_OLD], "its sealed secret was altered or belongs elsewhere, or the key 'old' is not the one"),
    ):
        caplog.clear()
        async with opened(path, keys, transport) as dispatcher:
            receipt = await dispatcher.emit("a")
            assert receipt.delivery_count == 1
            await dispatcher.emit("a")
            await until(lambda d=dispatcher: _problems(d))
            await dispatcher.drain(timeout=10)
            [problem] = (await dispatcher.health()).problems
            assert problem.startswith(f"endpoint {endpoint.id}: {says}")
            assert transport.requests == []
            [delivery] = (await dispatcher.deliveries.list(event_id=receipt.event_id)).items
            assert (delivery.state, delivery.attempt_count) == ("pending", 0)
            warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
            assert [says in record.getMessage() for record in warnings] == [True]
            with pytest.raises(ConflictError, match="sealed"):
                await dispatcher.deliveries.payload(delivery.id)
            [match] = (await dispatcher.explain("a")).matches
            assert (match.headers, says in (match.problem or "")) == ((), True)
        sql(path, "UPDATE hookwright_lane SET hold_until = 0")  # as a minute does
    async with opened(path, [OLD], transport) as dispatcher:
        await dispatcher.drain(timeout=10)
        assert len(transport.requests) == 6
        assert all(is_signed(request, endpoint.secret) for request in transport.requests)
        assert (await dispatcher.health()).problems == ()


async def _problems(dispatcher: Dispatcher) -> tuple[str, ...]:
    return (await dispatcher.health()).problems


async def test_an_endpoint_whose_key_is_lost_is_shown_and_what_is_sealed_stays_until_it_is_replaced(
    path: Path, transport: FakeTransport
) -> None:
    lost = await stored(path, [OLD], headers={"X-Token": HEADER})
    async with opened(path, [NEW], transport) as dispatcher:
        endpoints = dispatcher.endpoints
        for shown in (await endpoints.get(lost.id), *(await endpoints.list()), await endpoints.pause(lost.id)):
            assert (shown.secret_last4, shown.header_names) == ("", ("X-Token",))
        assert "key 'old'" in (await dispatcher.health()).problems[0]  # before anything was to be sent
        before = texts(path, lost.id)
        for refused in (endpoints.rotate_secret(lost.id), endpoints.reencrypt(), endpoints.test(lost.id)):
            with pytest.raises(ConflictError, match=r"key 'old'.*not among keys="):
                await refused
        assert (await endpoints.update(lost.id, name="renamed")).name == "renamed"
        assert texts(path, lost.id) == before
        sql(path, "UPDATE hookwright_lane SET tested_at = NULL")  # as ten seconds do
        rotated = await endpoints.rotate_secret(lost.id, overlap=timedelta(0))
        with pytest.raises(ConflictError, match="header:x-token"):
            await endpoints.test(lost.id)
        await endpoints.update(lost.id, headers={"X-Token": "another"})
        await endpoints.resume(lost.id)
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=10)
        assert is_signed(transport.requests[-1], rotated.secret)
        assert await _problems(dispatcher) == ()


async def test_a_key_of_the_same_id_and_other_bytes_is_found_out_by_reencrypt(path: Path) -> None:
    await stored(path, [OLD])
    async with opened(path, [EncryptionKey.generate(OLD.id)], FakeTransport()) as dispatcher:
        with pytest.raises(ConflictError, match="not the one it was sealed with"):
            await dispatcher.endpoints.reencrypt()


async def test_a_lost_secret_is_left_by_rotating_without_overlap(path: Path, transport: FakeTransport) -> None:
    lost = await stored(path, [OLD])
    async with opened(path, [NEW], transport) as dispatcher:
        with pytest.raises(ConflictError, match="key 'old'"):
            await dispatcher.endpoints.rotate_secret(lost.id)
        rotated = await dispatcher.endpoints.rotate_secret(lost.id, overlap=timedelta(0))
        await dispatcher.emit("a")
        await dispatcher.drain(timeout=10)
        [request] = transport.requests
        assert is_signed(request, rotated.secret)


async def test_a_lost_header_is_left_by_giving_new_ones(path: Path, transport: FakeTransport) -> None:
    endpoint = await stored(path, [NEW])
    lost = await stored(path, [OLD], headers={"X-Token": HEADER})
    _copy(path, "headers", lost.id, endpoint.id)
    async with opened(path, [NEW], transport) as dispatcher:
        assert any("header:x-token" in problem for problem in await _problems(dispatcher))
        await dispatcher.endpoints.update(endpoint.id, headers={"X-Token": "another"})
        attempt = await dispatcher.endpoints.test(endpoint.id)
        assert attempt.status == 200
    assert ("X-Token", "another") in transport.requests[0].headers


# -- sealed texts are bound to their place ----------------------------------------------------------------------


def _copy(path: Path, column: str, source: str, target: str) -> None:
    sql(
        path,
        f"UPDATE hookwright_endpoint SET {column} = (SELECT {column} FROM hookwright_endpoint WHERE id = ?)"
        " WHERE id = ?",
        source,
        target,
    )


async def _refused(path: Path, endpoint_id: str) -> str:
    """Return why nothing can be sent to the endpoint."""
    async with opened(path, [NEW], transport := FakeTransport()) as dispatcher:
        found = {match.endpoint_id: match for match in (await dispatcher.explain("a")).matches}
        assert found[endpoint_id].headers == ()
        with pytest.raises(ConflictError):
            await dispatcher.endpoints.reencrypt()
        assert transport.requests == []
        return found[endpoint_id].problem or ""


async def test_a_secret_or_header_copied_from_another_endpoint_does_not_open(path: Path) -> None:
    source = await stored(path, [NEW], headers={"X-Token": HEADER})
    target = await stored(path, [NEW], headers={"X-Token": HEADER})
    _copy(path, "keys", source.id, target.id)
    assert "sealed secret was altered or belongs elsewhere" in await _refused(path, target.id)
    target = await stored(path, [NEW], headers={"X-Token": HEADER})
    _copy(path, "headers", source.id, target.id)
    assert "sealed header:x-token was altered or belongs elsewhere" in await _refused(path, target.id)


async def test_a_secret_put_into_a_header_or_a_header_under_another_name_does_not_open(path: Path) -> None:
    endpoint = await stored(path, [NEW], headers={"X-Token": HEADER})
    keys, headers = texts(path, endpoint.id)
    for moved in ([["X-Token", keys[0][0]]], [["X-Other", headers[0][1]]]):
        sql(path, "UPDATE hookwright_endpoint SET headers = ? WHERE id = ?", json.dumps(moved), endpoint.id)
        assert "belongs elsewhere" in await _refused(path, endpoint.id)
    renamed = [["x-tOKEN", headers[0][1]]]
    sql(path, "UPDATE hookwright_endpoint SET headers = ? WHERE id = ?", json.dumps(renamed), endpoint.id)
    async with opened(path, [NEW]) as dispatcher:  # the same header: names have no case
        assert (await dispatcher.endpoints.test(endpoint.id)).status == 200


@pytest.mark.parametrize(
    ("alter", "says"),
    [
        (lambda text: text[:-6] + ("A" if text[-6] != "A" else "B") + text[-5:], "altered"),
        (lambda text: text[:20] + ("A" if text[20] != "A" else "B") + text[21:], "altered"),
        (lambda text: text.replace("enc:1:", "enc:2:"), "later version"),
        (lambda text: text[:-20], "altered"),
        (lambda text: text + "!", "altered"),
        (lambda text: "enc:1:new:", "altered"),
        (lambda text: "enc:1:new", "altered"),
        (lambda text: "enc:1:", "key ''"),
    ],
)
async def test_an_altered_text_does_not_open_and_is_not_shown(path: Path, alter: Any, says: str) -> None:
    endpoint = await stored(path, [NEW])
    [[text, expires_at]], _ = texts(path, endpoint.id)
    changed = json.dumps([[alter(text), expires_at]])
    sql(path, "UPDATE hookwright_endpoint SET keys = ? WHERE id = ?", changed, endpoint.id)
    why = await _refused(path, endpoint.id)
    assert says in why
    assert alter(text) not in why
    assert text[10:] not in why


async def test_the_same_text_is_sealed_differently_each_time(path: Path) -> None:
    secret = Secret.generate()
    endpoint = await stored(path, [NEW], secret=secret)
    first = texts(path, endpoint.id)[0]
    async with opened(path, [NEW]) as dispatcher:
        await dispatcher.endpoints.update(endpoint.id, name="renamed")
    second = texts(path, endpoint.id)[0]
    assert first[0][0] != second[0][0]
    assert first[0][0][:10] == second[0][0][:10] == "enc:1:new:"
