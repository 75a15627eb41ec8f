"""Canaries: unique texts in the place of everything secret, and a collector that hears wherever one sings."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import logging
import re
import traceback
import warnings
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import hookwright
from hookwright import ClientCertificate, EncryptionKey
from hookwright.testing._transport_contract_base import authority

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Sequence

SOURCE = str(Path(hookwright.__file__).parent)


def _key(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


GIVEN = "whsec_" + base64.b64encode(_key("given")).decode()
OLD = "whsec_" + base64.b64encode(_key("old")).decode()
TOKEN = "canary-header-7f3a91"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "X-Api-Key": 'canary-"own"/key+1'}
QUERY = "canary-query/4b+20"
PATH_TOKEN = "canary-path-token-55e1"
PATH = f"/services/{PATH_TOKEN}?token={quote(QUERY, safe='')}"
PAYLOAD = 'canary-payload "quoted" a/b'
ATTRIBUTE = "canary-attribute-19"
IDEMPOTENCY = "canary-idempotency-88"
DATA = {"field": PAYLOAD}
ENCRYPTION = EncryptionKey("k1", _key("encryption"))


@functools.cache
def certificate() -> ClientCertificate:
    issued = authority().issue_cert("client.example")
    chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems).decode()
    return ClientCertificate(chain, issued.private_key_pem.bytes().decode())


def _spelled(name: str, key: bytes, text: str) -> Iterable[tuple[str, str]]:
    bare = text.removeprefix("whsec_")
    spellings = (
        text,
        bare,
        bare.rstrip("="),
        bare.replace("/", "\\/"),
        quote(bare, safe=""),
        key.hex(),
        base64.urlsafe_b64encode(key).decode().rstrip("="),
        repr(key)[2:-1],
        max(re.split(r"[/+=]", bare), key=len),  # whatever is made of the others
        bare[:12],
        bare[-12:],
    )
    return ((name, spelling.lower()) for spelling in spellings)


@functools.cache
def secrets() -> list[tuple[str, str]]:
    """What no history may hold: signing secrets, header values, tokens of the url, keys."""
    pem = [line for line in certificate().key.splitlines() if not line.startswith("--")]
    return [
        *_spelled("secret", _key("given"), GIVEN),
        *_spelled("old secret", _key("old"), OLD),
        *_spelled("encryption key", _key("encryption"), ENCRYPTION.reveal()),
        *(("private key", line.lower()) for line in pem[:2]),
        ("header", TOKEN),
        ("header", "canary-&quot;own"),
        ("header", 'canary-"own'),
        ("header", 'canary-\\"own'),
        ("header", "canary-%22own"),
        ("header", "canary-\\u0022own"),
        ("query", "canary-query"),
        ("path", PATH_TOKEN),
    ]


@functools.cache
def everything() -> list[tuple[str, str]]:
    """What nothing shown may hold: these, and what applications put into events."""
    return [*secrets(), ("event data", "canary-payload"), ("attribute", ATTRIBUTE), ("idempotency key", IDEMPOTENCY)]


class Collector(logging.Handler):
    """Looks for canaries in whatever it is shown; `leaks` names where they were."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.leaks: list[str] = []
        self.looked_at = 0

    def note(self, where: str, text: str, forbidden: Sequence[tuple[str, str]] | None = None) -> None:
        """Look through a text."""
        self.looked_at += 1
        lowered = text.lower()
        for name, needle in everything() if forbidden is None else forbidden:
            at = lowered.find(needle)
            if at >= 0:
                self.leaks.append(f"{where}: {name}: {text[max(0, at - 100) : at + 60]!r}")
                return

    def show(self, where: str, *values: object) -> None:
        """Look at values as they are printed, by themselves and within others."""
        for value in values:
            self.note(f"{where} ({type(value).__name__})", f"{value!r} {value!s} {[value]} {value}")

    def raised(self, where: str, error: BaseException, *, given: bool = False) -> None:
        """Look at an error, its causes and its contexts, with the locals of our frames.

        `given`: the call itself was given what is looked for, so that the caller's frame holds it as well as ours do.
        """
        shown = traceback.TracebackException.from_exception(error, capture_locals=not given)
        todo: list[traceback.TracebackException | None] = [shown]
        while todo:
            one = todo.pop()
            if one is not None:
                ours = [frame for frame in one.stack if frame.filename.startswith(SOURCE) and not given]
                one.stack = traceback.StackSummary.from_list(ours)
                todo += [one.__cause__, one.__context__]
        self.note(where, "".join(shown.format()))
        chain: list[BaseException | None] = [error]
        while chain:
            each = chain.pop()
            if each is not None:
                self.note(f"{where} ({type(each).__name__})", f"{each!s} {each!r} {each.args!r} {vars(each)!r}")
                chain += [each.__cause__, each.__context__]

    def emit(self, record: logging.LogRecord) -> None:
        """Look at a log record: the message, what it was made of, and the error."""
        fields = {key: value for key, value in vars(record).items() if key not in ("exc_info", "exc_text")}
        self.note(f"log {record.name}", f"{record.getMessage()} {fields!r}")
        if record.exc_info and record.exc_info[1] is not None:
            self.raised(f"log {record.name}", record.exc_info[1])

    def unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Look at what reached the loop."""
        self.note("loop", repr(context))
        if isinstance(context.get("exception"), BaseException):
            self.raised("loop", context["exception"])

    def observe(self, observation: object) -> None:
        """Look at an observation."""
        self.show("observation", observation, vars(observation))


@asynccontextmanager
async def collecting(*, debug: bool = False) -> AsyncIterator[Collector]:
    """Hear all loggers at DEBUG, all warnings and the loop; `debug`: asyncio tells of every callback, too."""
    collector, loop = Collector(), asyncio.get_running_loop()
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    before = [(logger, logger.level, logger.disabled) for logger in loggers]
    slow = loop.slow_callback_duration
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
        logger.disabled = False
    logging.getLogger().addHandler(collector)
    loop.set_exception_handler(collector.unhandled)
    loop.set_debug(debug)
    loop.slow_callback_duration = 0.0 if debug else slow
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            yield collector
        for warning in warned:
            collector.note("warning", str(warning))
    finally:
        loop.set_debug(False)
        loop.slow_callback_duration = slow
        loop.set_exception_handler(None)
        logging.getLogger().removeHandler(collector)
        for logger, level, disabled in before:
            logger.setLevel(level)
            logger.disabled = disabled
