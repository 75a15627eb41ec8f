"""`hookwright demo`: a dispatcher, four receivers in another process, a dozen events, and what became of them."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from hookwright import (
    DeliveryFailed,
    DeliveryObservation,
    DeliveryRetrying,
    DeliveryState,
    DeliverySucceeded,
    Dispatcher,
    EndpointDisabled,
    NetworkPolicy,
    Observation,
    Profile,
    RetryPolicy,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from rich.console import Console

EVENTS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("video.uploaded", {"videoId": "vid_1", "title": "A mountain at sunrise", "status": "processing"}, "idx_archive"),
    ("video.processed", {"videoId": "vid_1", "formats": ["1080p", "720p"], "processingTime": 300}, "idx_archive"),
    ("video.published", {"videoId": "vid_1", "url": "https://video.example/vid_1"}, "idx_archive"),
    ("video.script_ready", {"video_id": "vid_2", "scene_count": 8}, "idx_new"),
    ("video.media_ready", {"video_id": "vid_2", "total_duration": 87.5}, "idx_new"),
    ("render.started", {"render_job_id": "rnd_1", "quality": "high"}, "idx_new"),
    ("render.completed", {"render_job_id": "rnd_1", "file_size": 25690112}, "idx_new"),
    ("render.failed", {"render_job_id": "rnd_2", "error": "no answer after 300 s"}, "idx_new"),
    ("tool_execution.succeeded", {"toolExecutionId": "vg_exec_1", "toolType": "GENERATE_IMAGE"}, "idx_new"),
    ("file.upload.completed", {"fileId": "vg_file_1"}, "idx_archive"),
    ("prompt_run.completed", {"prompt_run_id": "run_1", "matches": 4}, "idx_archive"),
    ("export.ready", {"export_id": "exp_1"}, "idx_archive"),
)
"""Type, data, and the index that filters look at."""

SCHEDULE = (0.0, 0.3, 0.6)

EXPECTED: Mapping[str, Mapping[str, int]] = {
    "healthy": {"succeeded": 12},
    "flaky": {"succeeded": 5},
    "down": {"failed": 1},
    "gone": {"failed": 1, "skipped": 5},
}
"""How the deliveries to each receiver must end."""

_SUBSCRIPTIONS: Mapping[str, tuple[list[str], dict[str, list[str | int | bool]] | None]] = {
    "healthy": (["*"], None),
    "flaky": (["video.*"], None),
    "down": (["render.failed"], None),
    "gone": (["*"], {"index": ["idx_archive"]}),
}


@dataclass
class _Line:
    event_type: str
    receiver: str
    attempts: int = 0
    state: str = "waiting"
    detail: str = ""


class Board:
    """What the table shows. It is fed by observers alone."""

    def __init__(self, console: Console, receivers: Mapping[str, str]) -> None:
        self._console = console
        self._receivers = receivers
        self._lines: dict[str, _Line] = {}

    def observe(self, observation: Observation) -> None:
        """Take in one observation; without a terminal, print it as a line."""
        if isinstance(observation, EndpointDisabled):
            self._say(f"endpoint {self._receivers[observation.endpoint_id]} disabled: {observation.reason}")
        if not isinstance(observation, DeliveryObservation):
            return
        receiver = self._receivers[observation.endpoint_id]
        line = self._lines.setdefault(observation.delivery_id, _Line(observation.event_type, receiver))
        line.attempts = observation.attempt
        match observation:
            case DeliverySucceeded(status=status, duration=duration):
                line.state, line.detail = "succeeded", f"{status} in {duration * 1000:.0f} ms"
            case DeliveryRetrying(error=error):
                line.state, line.detail = "retrying", error
            case DeliveryFailed(reason=reason, error=error):
                line.state, line.detail = "failed", f"{reason}: {error}"
            case _:
                return
        self._say(f"{line.event_type:26}{receiver:9}{line.attempts:>2}  {line.state:10}{line.detail}")

    def _say(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(shown(text))

    def __rich__(self) -> Table:
        table = Table("event", "receiver", "attempts", "state", "last", title="Deliveries")
        for line in self._lines.values():
            cells = (line.event_type, line.receiver, str(line.attempts), line.state, line.detail)
            table.add_row(*(shown(cell) for cell in cells))
        return table


def shown(text: str) -> str:
    """Return received text so that it can neither mark up nor control the terminal."""
    return escape("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


class Receivers:
    """The process of `_demo_receivers`, spoken to over its pipes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    async def urls(self) -> dict[str, str]:
        """Return where each listens, and one where nobody does."""
        urls: dict[str, str] = json.loads(await self._stdout.readline())
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            return urls | {"down": f"http://127.0.0.1:{unused.getsockname()[1]}/"}

    async def expect(self, name: str, secret: str) -> None:
        """Tell a receiver its secret."""
        self._stdin.write(json.dumps({name: secret}).encode() + b"\n")
        await self._stdin.drain()

    async def seen(self) -> dict[str, dict[str, int]]:
        """End the input, and return what each saw."""
        self._stdin.close()
        found: dict[str, dict[str, int]] = json.loads(await self._stdout.readline())
        return found


@asynccontextmanager
async def _receivers() -> AsyncIterator[Receivers]:
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", "hookwright._demo_receivers")
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    try:
        yield Receivers(process)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def run(console: Console, expected: Mapping[str, Mapping[str, int]] = EXPECTED) -> bool:
    """Show the whole of it; say whether every outcome was the expected one."""
    profiles = {"default": Profile(retry=RetryPolicy.schedule(*SCHEDULE))}
    with tempfile.TemporaryDirectory(prefix="hookwright-demo-") as folder:
        database = Path(folder) / "hooks.db"
        async with (
            _receivers() as receivers,
            Dispatcher(
                f"sqlite:///{database}",
                profiles=profiles,
                network=NetworkPolicy.development(),
                shutdown_timeout=1.0,
                keys=[],
            ) as dispatcher,
        ):
            names = await _subscribe(console, dispatcher, receivers)
            await _deliver(console, dispatcher, names)
            await _show_history(console, dispatcher, names)
            outcomes = await _outcomes(dispatcher, names)
            seen = await receivers.seen()
    return _compare(console, outcomes, seen, expected)


async def _subscribe(console: Console, dispatcher: Dispatcher, receivers: Receivers) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, url in (await receivers.urls()).items():
        events, filters = _SUBSCRIPTIONS[name]
        endpoint = await dispatcher.endpoints.create(url, events=events, filters=filters, name=name, concurrency=2)
        names[endpoint.id] = name
        assert endpoint.secret is not None
        if name != "down":
            await receivers.expect(name, endpoint.secret.reveal())
        where = f" where {filters}" if filters else ""
        console.print(shown(f"subscribed {name:9}{url:24} to {', '.join(events)}{where}"), soft_wrap=True)
    return names


async def _deliver(console: Console, dispatcher: Dispatcher, names: Mapping[str, str]) -> None:
    board = Board(console, names)
    dispatcher.observe(board.observe)
    console.print(
        f"\nemitting {len(EVENTS)} events; a failed attempt is repeated after {SCHEDULE[1]} and {SCHEDULE[2]} s\n"
    )
    with Live(board, console=console, refresh_per_second=8, auto_refresh=console.is_terminal, transient=False) as live:
        receipts = [await dispatcher.emit(type, data, attributes={"index": index}) for type, data, index in EVENTS]
        for receipt in receipts:
            await dispatcher.deliveries.wait(receipt.event_id, timeout=12)
        live.refresh()


async def _show_history(console: Console, dispatcher: Dispatcher, names: Mapping[str, str]) -> None:
    flaky = next(id for id, name in names.items() if name == "flaky")
    page = await dispatcher.deliveries.list(endpoint_id=flaky, status=DeliveryState.SUCCEEDED, limit=500)
    retried = max(page.items, key=lambda delivery: delivery.attempt_count, default=None)
    if retried is None:
        return
    table = Table("attempt", "started", "took", "answer", title=f"History of {retried.event_type} to flaky")
    for attempt in await dispatcher.deliveries.attempts(retried.id):
        answer = f"{attempt.status or '-'} {attempt.error or 'accepted'}"
        started = f"{attempt.started_at:%H:%M:%S.%f}"[:-3]
        table.add_row(str(attempt.number), started, f"{attempt.duration * 1000:.0f} ms", shown(answer))
    console.print()
    console.print(table)


async def _outcomes(dispatcher: Dispatcher, names: Mapping[str, str]) -> dict[str, Counter[str]]:
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in names.values()}
    page = await dispatcher.deliveries.list(limit=500)
    for delivery in page.items:
        outcomes[names[delivery.endpoint_id]][delivery.state.value] += 1
    return outcomes


def _compare(
    console: Console,
    outcomes: Mapping[str, Mapping[str, int]],
    seen: Mapping[str, Mapping[str, int]],
    expected: Mapping[str, Mapping[str, int]],
) -> bool:
    console.print()
    fine = True
    for name, wanted in expected.items():
        found = dict(outcomes.get(name, {}))
        signed = seen.get(name, {"received": 0, "verified": 0})
        good = found == dict(wanted) and signed["received"] == signed["verified"]
        fine = fine and good
        requests = f"{signed['received']} requests, {signed['verified']} verified"
        verdict = "as expected" if good else f"EXPECTED {dict(wanted)}"
        console.print(shown(f"{'ok ' if good else 'NOT'} {name:9}{found}  ({requests})  {verdict}"))
    console.print("\nEvery outcome is the expected one." if fine else "\nSomething went differently, see above.")
    return fine
