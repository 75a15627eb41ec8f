"""What the files hold with keys and without, the way from clear text to sealed, and keys that are refused."""

from __future__ import annotations

import asyncio
import copy
import logging
import pickle
import sqlite3
import sys
from typing import TYPE_CHECKING, Any

import pytest

from hookwright import (
    ConfigurationError,
    ConflictError,
    Dispatcher,
    EncryptionKey,
    NewEvent,
    NotFound,
    Secret,
    StorageBusy,
    ValidationFailed,
)
from hookwright.testing import FakeTransport
from tests.conftest import URL, until
from tests.test_encryption import HEADER, NEW, OLD, is_signed, opened, stored, texts

if TYPE_CHECKING:
    from pathlib import Path

GIVEN = "MARKER-GIVEN-SECRET-01"
ROTATED = "MARKER-ROTATED-SECRET-02"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hooks.db"


@pytest.fixture
def transport() -> FakeTransport:
    return FakeTransport()


def files(path: Path) -> bytes:
    """Return every byte that the storage keeps."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(path.name + "*")))


# -- what the files hold ----------------------------------------------------------------------------------------


async def test_neither_secrets_nor_header_values_are_ever_in_the_files(path: Path) -> None:
    async with opened(path, [NEW]) as dispatcher:
        endpoint = await dispatcher.endpoints.create(
            URL, events=["*"], profile="hex", secret=Secret.text(GIVEN), headers={"X-Token": HEADER}
        )
        await dispatcher.endpoints.rotate_secret(endpoint.id, secret=Secret.text(ROTATED))
        await dispatcher.emit("a")
        await dispatcher.endpoints.test(endpoint.id)
        await dispatcher.drain(timeout=10)
        found = files(path)
        assert b"X-Token" in found
        assert path.with_name("hooks.db-wal").stat().st_size > 0
        assert b"MARKER" not in found
    assert b"X-Token" in files(path)
    assert b"MARKER" not in files(path)


async def test_reencrypting_leaves_nothing_of_the_clear_text_that_was_there(path: Path) -> None:
    async with opened(path, None) as dispatcher:
        for number in range(300):  # enough for pages to be divided, again and again
            await dispatcher.endpoints.create(
                URL,
                events=["*"],
                profile="hex",
                secret=Secret.text(GIVEN * (number % 7 + 1)),
                headers={"X-Token": HEADER * (number % 5 + 1)},
            )
        page = await dispatcher.endpoints.list(limit=150)
        for endpoint in page.items:
            await dispatcher.endpoints.rotate_secret(endpoint.id, secret=Secret.text(ROTATED))
    assert b"MARKER" in files(path)
    async with opened(path, [NEW], deliver=False) as dispatcher:
        assert await dispatcher.endpoints.reencrypt() == 300
        found = files(path)
        parts = (b"MARKER-", b"R-GIVEN", b"-SECRET", b"-HEADER")  # with what base64 has not
        assert [part for part in parts if part in found] == []
        [match, *_] = (await dispatcher.explain("a")).matches
        assert match.problem is None


async def test_a_reader_that_keeps_clear_pages_alive_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hookwright.storage.sqlite.BUSY_LIMIT", 0.0)
    await stored(path, [], headers={"X-Token": HEADER})
    async with opened(path, [NEW], deliver=False) as dispatcher:
        reader = sqlite3.connect(path, isolation_level=None)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM hookwright_endpoint").fetchall()
        with pytest.raises(StorageBusy, match="WAL"):
            await dispatcher.endpoints.reencrypt()
        reader.close()
        assert await dispatcher.endpoints.reencrypt() == 0
        assert b"MARKER" not in files(path)


async def test_reencrypting_survives_endpoints_that_change_and_go_meanwhile(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(path, []) as dispatcher:
        changed, gone, _ = [await dispatcher.endpoints.create(URL, events=["*"]) for _ in range(3)]
    async with opened(path, [NEW]) as dispatcher, opened(path, [], deliver=False) as other:
        storage = dispatcher._storage
        update, met = storage.update_endpoint, set[str]()

        async def meddled(row: Any) -> Any:
            if row.id not in met:
                met.add(row.id)
                if row.id == changed.id:
                    await other.endpoints.update(row.id, name="renamed")
                if row.id == gone.id:
                    await other.endpoints.delete(row.id)
            return await update(row)

        monkeypatch.setattr(storage, "update_endpoint", meddled)
        assert await dispatcher.endpoints.reencrypt() == 2
        assert (await dispatcher.endpoints.get(changed.id)).name == "renamed"
        with pytest.raises(NotFound):
            await dispatcher.endpoints.get(gone.id)
    assert texts(path, changed.id)[0][0][0].startswith("enc:1:new:")


async def test_what_can_be_reencrypted_is_though_one_endpoint_cannot_be_opened(path: Path) -> None:
    await stored(path, [], headers={"X-Token": HEADER})
    lost = await stored(path, [OLD])
    await stored(path, [], headers={"X-Token": HEADER})
    async with opened(path, [NEW]) as dispatcher:
        with pytest.raises(ConflictError, match=f"1 endpoints cannot be opened.*{lost.id}: its secret.*'old'"):
            await dispatcher.endpoints.reencrypt()
        assert b"MARKER" not in files(path)


async def test_two_processes_go_on_while_one_reencrypts(path: Path, transport: FakeTransport) -> None:
    async with opened(path, [OLD, NEW], transport) as old, opened(path, [NEW, OLD], deliver=False) as new:
        endpoints = [await old.endpoints.create(f"{URL}/{n}", events=["*"]) for n in range(5)]
        _, count = await asyncio.gather(old.emit_many([NewEvent("a")] * 5), new.endpoints.reencrypt())
        assert count == 5
        await new.emit("a")
        await until(lambda: len(transport.requests) == 30)
        secrets = {f"{URL}/{n}": endpoint.secret for n, endpoint in enumerate(endpoints)}
        assert all(is_signed(request, secrets[request.url]) for request in transport.requests)


# -- clear text -------------------------------------------------------------------------------------------------


async def test_clear_text_is_warned_of_once_and_only_where_it_is_kept_and_not_meant(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(path, None) as dispatcher:
        await dispatcher.emit("a")
        assert _warnings(caplog) == []
        endpoint = await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.create(URL, events=["*"])
        await dispatcher.endpoints.rotate_secret(endpoint.id)
    assert _warnings(caplog) == [
        "endpoints' secrets are stored in clear text: give keys=[EncryptionKey(...)], or keys=[] if that is meant"
    ]
    caplog.clear()
    await stored(path, [])
    await stored(path, [NEW])
    async with Dispatcher("memory:", transport=FakeTransport()) as dispatcher:
        await dispatcher.endpoints.create(URL, events=["*"])
    assert _warnings(caplog) == []


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_clear_text_from_before_is_read_with_keys_and_sealed_with_the_next_change(
    path: Path, transport: FakeTransport
) -> None:
    endpoint = await stored(path, [])
    async with opened(path, [NEW], transport) as dispatcher:
        assert (await dispatcher.endpoints.test(endpoint.id)).status == 200
        assert is_signed(transport.requests[0], endpoint.secret)
        assert texts(path, endpoint.id)[0][0][0].startswith("whsec_")
        await dispatcher.endpoints.update(endpoint.id, name="renamed")
        assert texts(path, endpoint.id)[0][0][0].startswith("enc:1:new:")


@pytest.mark.parametrize("keys", [None, []])
async def test_without_keys_nothing_is_reencrypted(path: Path, keys: list[EncryptionKey] | None) -> None:
    async with opened(path, keys) as dispatcher:
        with pytest.raises(ConfigurationError, match="keys="):
            await dispatcher.endpoints.reencrypt()


# -- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [[], [NEW]])
async def test_a_text_that_looks_sealed_is_refused(path: Path, keys: list[EncryptionKey]) -> None:
    looks = "enc:1:new:" + "A" * 40
    async with opened(path, keys) as dispatcher:
        endpoints = dispatcher.endpoints
        endpoint = await endpoints.create(URL, events=["*"], profile="hex", headers={"X-Token": "enc:x"})
        for refused, field in (
            (endpoints.create(URL, events=["*"], profile="hex", secret=Secret.text(looks)), "secret"),
            (endpoints.create(URL, events=["*"], headers={"X-Token": looks}), "headers"),
            (endpoints.update(endpoint.id, headers={"X-Token": looks}), "headers"),
            (endpoints.rotate_secret(endpoint.id, secret=Secret.text(looks)), "secret"),
        ):
            with pytest.raises(ValidationFailed, match="must not begin with 'enc:'") as caught:
                await refused
            assert caught.value.field == field
            assert "AAAA" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (NEW, "give a list"),
        ({"new": NEW}, "give a list"),
        (NEW.reveal(), "give a list"),
        ("", "give a list"),
        ([NEW.reveal()], "only, not str"),
        (b"n" * 32, "give a list"),
        ([NEW, EncryptionKey("new", b"m" * 32)], "two have the id 'new'"),
    ],
)
def test_keys_of_the_wrong_kind_are_refused_and_not_shown(keys: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says) as caught:
        Dispatcher("memory:", keys=keys)
    assert NEW.reveal()[:8] not in str(caught.value)


@pytest.mark.parametrize("id", ["", "a" * 33, "a:b", "é", "a\n", None])
def test_an_id_that_cannot_stand_in_a_sealed_text_is_refused(id: Any) -> None:
    with pytest.raises(ConfigurationError, match="id must be 1 to 32"):
        EncryptionKey(id, b"n" * 32)


@pytest.mark.parametrize("key", [b"PRIVATE" * 5, "UFJJVkFURQ==", "PRIVATE!" * 4, "é" * 32, 5, None])
def test_a_key_that_is_not_32_bytes_is_refused_and_not_shown(key: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"32 bytes.*EncryptionKey\.generate\('new'\)") as caught:
        EncryptionKey("new", key)
    assert "PRIVATE" not in str(caught.value)
    assert "UFJJ" not in str(caught.value)


def test_without_cryptography_keys_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    Dispatcher("memory:", keys=[])
    with pytest.raises(ConfigurationError, match=r"pip install 'hookwright\[encryption\]'"):
        Dispatcher("memory:", keys=[NEW])


# -- the key ----------------------------------------------------------------------------------------------------


def test_a_key_is_revealed_on_purpose_only() -> None:
    key = EncryptionKey.generate("k1")
    again = EncryptionKey("k1", key.reveal())
    assert (again, hash(again), copy.deepcopy(key)) == (key, hash(key), key)
    assert key != EncryptionKey.generate("k1")
    assert key != EncryptionKey("k2", key.reveal())
    assert key != key.reveal()
    shown = [repr(key), str(key), f"{key}", f"{[key]}", f"{Dispatcher('memory:', keys=[key])._vault!r}"]
    assert all("k1" in text and key.reveal()[:6] not in text for text in shown)
    assert shown[0] == "EncryptionKey('k1', '****')"
    with pytest.raises(AttributeError, match="cannot be changed"):
        key.id = "k2"  # type: ignore[misc]  # that is what is tested
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(key)
