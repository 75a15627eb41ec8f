"""Receivers, and the way to them: each request is checked when it leaves, and kept when it arrives."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hookwright import Failure, Response
from hookwright.receiver import VerificationFailed, Verifier
from tests.simulation._rules import LEASE_MARGIN, RETRY_AFTER_MOST, SECOND

if TYPE_CHECKING:
    from hookwright import Request
    from tests.simulation._leases import Held
    from tests.simulation._port import Disk
    from tests.simulation._process import Process

BEHAVIOURS = ("200", "204", "500", "503", "429", "410", "slow", "hang", "deaf", "connect_error", "raise")


@dataclass
class Behaviour:
    """What a receiver does; `retry_after` goes with 429 and 503."""

    kind: str = "200"
    retry_after: int = 0


class Received(NamedTuple):
    """A request that reached its receiver."""

    delivery_id: str
    event_id: str
    number: int
    process: int


class Receivers:
    """All of them, by url."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._by_url: dict[str, Behaviour] = {}
        self.requests: list[Received] = []
        self.repeats = 0
        self._answered: set[str] = set()

    def behave(self, url: str, behaviour: Behaviour) -> None:
        self._by_url[url] = behaviour

    def recover(self) -> None:
        """All answer 200 from now on."""
        self._by_url.clear()

    def at(self, url: str) -> Behaviour:
        return self._by_url.get(url, Behaviour())

    def arrive(self, request: Request, process: Process, held: Held) -> None:
        """A request reached its receiver."""
        headers = dict(request.headers)
        held.reached = True
        self.requests.append(Received(held.delivery_id, headers["webhook-id"], held.number, process.number))
        self.repeats += held.delivery_id in self._answered
        self._disk.tell(f"  {process.number} reaches {request.url} {held.delivery_id} number={held.number}")

    def answered(self, held: Held) -> None:
        """It was accepted: what comes again is a repeat."""
        self._answered.add(held.delivery_id)


class Wire:
    """A process's transport."""

    def __init__(self, receivers: Receivers, disk: Disk, process: Process) -> None:
        self._receivers = receivers
        self._disk = disk
        self._process = process
        self.under_way: dict[str, tuple[Request, Held]] = {}

    async def aclose(self) -> None:
        await self._disk.pause()

    async def send(self, request: Request) -> Response | Failure:
        await self._process.port.cut_off()
        held = self._departs(request)
        if held is None:
            return Failure("connect_error", "it should not have been sent")
        self.under_way[held.delivery_id] = request, held
        try:
            await self._disk.pause()
            await self._process.port.cut_off()
            answer = await self._answer(request, held)
            await self._disk.pause()
        except RuntimeError:
            held.answer = "transport_error"
            raise
        finally:
            self.under_way.pop(held.delivery_id, None)
        held.answer = str(answer[0])
        return answer

    async def _answer(self, request: Request, held: Held) -> Response | Failure:
        behaviour = self._receivers.at(request.url)
        kind = behaviour.kind
        self._disk.tell(f"  {self._process.number} sends {held.delivery_id} number={held.number} to find {kind}")
        if kind == "connect_error":
            return Failure("connect_error")
        self._receivers.arrive(request, self._process, held)
        if kind in ("hang", "deaf"):
            await (asyncio.Event().wait() if kind == "deaf" else self._process.clock.sleep(request.total_timeout))
            return Failure("timeout")
        if kind == "raise":
            raise RuntimeError("a transport of the application's")
        if kind == "slow":
            await self._process.clock.sleep(request.total_timeout / 2)
        status = int(kind) if kind.isdigit() else 200
        if 200 <= status < 300:
            self._receivers.answered(held)
        asks = behaviour.retry_after if status in (429, 503) else 0
        held.retry_after = min(asks, RETRY_AFTER_MOST)
        return Response(status, (("retry-after", str(asks)),) if asks else ())

    def die(self) -> None:
        """Let some of what is under way arrive, though nobody hears the answer."""
        for request, held in list(self.under_way.values()):
            if not held.reached and self._disk.chance.random() < 0.5:
                self._receivers.arrive(request, self._process, held)
        self.under_way.clear()

    # -- what must be true of a request that leaves ---------------------------------------------------------------

    def _departs(self, request: Request) -> Held | None:
        headers, require = dict(request.headers), self._disk.model.require
        id = headers.get("x-delivery", "")
        held = self._process.leases.get(id)
        row = self._disk.model.rows.get(id)
        if held is None or row is None:
            require(row is None and held is not None, f"{id} was sent without a lease")
            return None
        require(not held.sent, f"{id} was sent twice under one lease")
        held.sent, held.answer = True, "timeout"
        require(headers["x-attempt"] == str(held.number), f"{id}: attempt {headers['x-attempt']}, not {held.number}")
        require(headers["webhook-id"] == row.event_id, f"{id}: its id is {headers['webhook-id']}")
        require(request.endpoint_id == row.endpoint_id, f"{id} was sent to {request.endpoint_id}")
        left = held.until - self._process.clock.now()
        require(left >= (request.total_timeout + LEASE_MARGIN) * SECOND, f"{id} left with a lease of {left}")
        self._check_room(row.endpoint_id, held)
        self._check_signature(request, row.endpoint_id, held)
        return held

    def _check_room(self, endpoint_id: str, held: Held) -> None:
        beside = [other for request, other in self.under_way.values() if request.endpoint_id == endpoint_id]
        oldest = min([held.at, *(other.at for other in beside)])
        cap = max(version.cap for version in self._disk.model.endpoints[endpoint_id].since(oldest))
        require = self._disk.model.require
        require(len(beside) < cap, f"{endpoint_id} has {len(beside) + 1} in flight, its cap is {cap}")
        most = self._process.concurrency
        require(len(self.under_way) < most, f"{len(self.under_way) + 1} in flight, the concurrency is {most}")

    def _check_signature(self, request: Request, endpoint_id: str, held: Held) -> None:
        versions = self._disk.model.endpoints[endpoint_id].since(held.at)
        now = self._process.clock.now()
        first = versions[0]
        require = self._disk.model.require
        require(
            any(version.url == request.url for version in versions), f"{held.delivery_id} was sent to {request.url}"
        )
        live = [
            key.text
            for version in versions
            for key in version.keys
            if key.expires_at is None or key.expires_at > now or (version is not first and key.expires_at <= now)
        ]
        newest = [version.keys[0].text for version in versions if version.keys]
        wall = self._process.clock.wall() / SECOND
        for secrets in (live, newest):
            try:
                Verifier(*secrets, tolerance=60, now=lambda: wall).verify(request.body, request.headers)
            except VerificationFailed as error:
                require(False, f"{held.delivery_id}: {error}")
        tokens = dict(request.headers)["webhook-signature"].split(" ")
        for token in tokens:
            alone = dict(request.headers) | {"webhook-signature": token}
            try:
                Verifier(*live, tolerance=60, now=lambda: wall).verify(request.body, alone)
            except VerificationFailed:
                require(False, f"{held.delivery_id} was signed by a secret that had ended")
