"""kill -9, at random and everywhere. The short form; `python -m tests.crash` is the long one."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from hookwright.storage._base import FREE_INTERRUPTIONS
from tests.crash.campaign import (
    Figures,
    Harness,
    count_points,
    drain,
    every_point,
    harness,
    kill_at,
    kill_at_random,
    poison,
)
from tests.crash.child import CONCURRENCY, NEIGHBOURS, Command
from tests.crash.databases import PostgresDatabases, SQLiteDatabase
from tests.crash.forkserver import forking
from tests.crash.oracle import Oracle
from tests.crash.picture import Picture, Row
from tests.crash.receiver import Request, receiving
from tests.crash.report import BEGIN, END, table, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.crash.campaign import Campaign

POINT_SLICES = 8
POSTGRES_SLICES = 90
RANDOM_KILLS = 15
# A second is what the long form asks for, on a quiet machine. Here: nobody waits for the end of a lease, 60 s away.
RESUMES_WITHIN = 20.0


@pytest.fixture
def crash(tmp_path: Path) -> Iterator[Harness]:
    with harness(tmp_path, seed=1, resumes_within=RESUMES_WITHIN) as running:
        yield running


@pytest.fixture
def crash_on_postgres(tmp_path: Path, postgres_dsn: str) -> Iterator[Harness]:
    databases = PostgresDatabases(postgres_dsn)
    with harness(tmp_path, seed=1, databases=databases, resumes_within=RESUMES_WITHIN) as running:
        yield running


# -- the promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kills_at_random_moments_under_load_break_no_promise(crash: Harness, seed: int) -> None:
    kill_at_random(crash, RANDOM_KILLS, random.Random(seed))
    assert crash.figures.broken == []
    assert crash.figures.random_kills == RANDOM_KILLS
    assert crash.figures.acknowledged > RANDOM_KILLS
    assert crash.figures.repeats <= sum(crash.figures.leased_at_kills)
    assert crash.figures.resumed


@pytest.mark.parametrize("first", [0, 3, 4, 7])  # of POINT_SLICES: the long form takes them all
def test_a_kill_before_or_after_any_statement_or_send_breaks_no_promise(crash: Harness, first: int) -> None:
    counted = len(count_points(crash))
    assert counted > 200
    points = every_point(counted)[:counted][first::POINT_SLICES]
    for point in points:
        kill_at(crash, point)
    assert crash.figures.broken == []
    # Two connections have two threads: a life may pass a few points fewer than the one that was counted.
    assert crash.figures.points_missed <= 5
    assert crash.figures.point_kills + crash.figures.points_missed == len(points)


def test_kills_at_random_moments_break_no_promise_on_postgresql(crash_on_postgres: Harness) -> None:
    kill_at_random(crash_on_postgres, RANDOM_KILLS // 2, random.Random(1))
    assert crash_on_postgres.figures.broken == []
    assert crash_on_postgres.figures.acknowledged > 0
    assert crash_on_postgres.figures.resumed


@pytest.mark.parametrize("first", [5, 50])  # of POSTGRES_SLICES
def test_a_kill_before_or_after_a_statement_breaks_no_promise_on_postgresql(
    crash_on_postgres: Harness, first: int
) -> None:
    counted = len(count_points(crash_on_postgres))
    assert counted > 100  # a claim and a settle are one statement each
    points = every_point(counted)[first::POSTGRES_SLICES]
    for point in points:
        kill_at(crash_on_postgres, point)
    figures = crash_on_postgres.figures
    assert figures.broken == []
    # Reads and notifications come as time passes: a life may end before a late point.
    assert figures.point_kills > len(points) // 2
    assert figures.point_kills + figures.points_missed == len(points)


def test_neighbours_of_an_event_that_kills_whoever_sends_it_are_delivered_on_postgresql(
    crash_on_postgres: Harness,
) -> None:
    assert _poisoned(crash_on_postgres, attempts=2, seconds=0.1) == ["succeeded"] * NEIGHBOURS


def test_what_is_lost_is_noticed_on_postgresql(crash_on_postgres: Harness, tmp_path: Path) -> None:
    _tampered(crash_on_postgres, tmp_path, _forget_an_event)
    assert crash_on_postgres.figures.count("lost") > 0


def _poisoned(crash: Harness, *, attempts: int, **how: float) -> list[str]:
    """Return what became of a poison's neighbours, when it has ended as it must."""
    picture, kills = poison(crash, attempts=attempts, **how)
    rows = {event_id: row for (_, event_id), row in picture.rows.items()}
    ended = rows.pop("evt_poison")
    assert kills == FREE_INTERRUPTIONS + attempts
    assert (ended.state, ended.interruptions, ended.attempts) == ("failed", kills, kills)
    # Deliveries that were interrupted too often are spread: what waits then is not due at once.
    assert [promise for promise, _ in crash.figures.broken if promise != "slow"] == []
    return [row.state for row in rows.values()]


def test_an_event_that_kills_whoever_sends_it_ends_and_its_neighbours_are_delivered(crash: Harness) -> None:
    assert _poisoned(crash, attempts=2, seconds=0.1) == ["succeeded"] * NEIGHBOURS


def test_deliveries_are_parted_from_one_that_kills_as_soon_as_they_are_claimed_together(crash: Harness) -> None:
    assert _poisoned(crash, attempts=4, seconds=0.0) == ["succeeded"] * NEIGHBOURS


# -- the oracle can fail --------------------------------------------------------------------------------------------


def _forget_an_event(campaign: Campaign, log: Path) -> None:
    _change(campaign, "DELETE FROM hookwright_event WHERE id = ?", "DELETE FROM hookwright_delivery WHERE event_id = ?")


def _forget_a_delivery(campaign: Campaign, log: Path) -> None:
    _change(
        campaign,
        "DELETE FROM hookwright_delivery WHERE id = (SELECT max(id) FROM hookwright_delivery WHERE event_id = ?)",
    )


def _end_without_sending(campaign: Campaign, log: Path) -> None:
    _change(campaign, "UPDATE hookwright_delivery SET state = 'succeeded', available_at = NULL WHERE event_id = ?")


def _change(campaign: Campaign, *statements: str) -> None:
    newest = max(campaign.oracle.acknowledged, key=lambda id: int(id.removeprefix("evt_")))
    leased = "SELECT id FROM hookwright_delivery WHERE event_id = ?"
    campaign.database.change(f"DELETE FROM hookwright_lease WHERE delivery_id IN ({leased})", newest)
    for statement in statements:
        assert campaign.database.change(statement, newest) > 0


def _repeat_a_request(campaign: Campaign, log: Path) -> None:
    last = log.read_bytes().splitlines()[0]
    with log.open("ab") as file:
        file.write(last + b"\n")


@pytest.mark.parametrize(
    ("tamper", "promise"),
    [
        (_forget_an_event, "lost"),
        (_end_without_sending, "lost"),
        (_forget_a_delivery, "half"),
        (_repeat_a_request, "unexplained"),
        (_repeat_a_request, "unrecorded"),
    ],
)
def test_what_is_lost_or_repeated_is_noticed(
    crash: Harness, tmp_path: Path, tamper: Callable[[Campaign, Path], None], promise: str
) -> None:
    _tampered(crash, tmp_path, tamper)
    assert crash.figures.count(promise) > 0


def _tampered(crash: Harness, tmp_path: Path, tamper: Callable[[Campaign, Path], None]) -> None:
    with crash.campaign() as campaign:
        campaign.live("prepare")
        while not campaign.oracle.acknowledged or not campaign.oracle.requests:
            campaign.live("load", kill_after=0.4)
        assert campaign.oracle.broken == []
        tamper(campaign, tmp_path / "requests.log")
        drain(crash, campaign)


def test_a_process_that_cannot_start_is_noticed(crash: Harness) -> None:
    with crash.campaign() as campaign:
        assert isinstance(campaign.database, SQLiteDatabase)
        campaign.database.path.with_name("hooks.db-deliver.lock").mkdir()
        campaign.live("drain")
    assert crash.figures.count("stuck") == 1


LEASED = Row("pending", "token", 0, 0, 0, 0, 0, "active", None)
DELIVERED = Row("succeeded", None, 1, 0, 1, 0, 1, "active", None)


def _of_two(row: Row) -> dict[tuple[str, str], Row]:
    return {(f"/1/load/{number}", "evt_0"): row for number in (0, 24)}


def _seen(oracle: Oracle) -> None:
    oracle.acknowledge(["evt_0"])
    oracle.receive(Request(path, "evt_0", 200, 0.0, 0.0) for path, _ in _of_two(DELIVERED))


def test_a_damaged_file_is_noticed() -> None:
    oracle = Oracle("/1/")
    oracle.killed(Picture("row 1 missing from index", frozenset(), {}))
    assert [promise for promise, _ in oracle.broken] == ["integrity"]


def test_more_leases_at_a_kill_than_the_concurrency_are_noticed() -> None:
    oracle, rows = Oracle("/1/"), {}
    for number in range(CONCURRENCY):
        for path, _ in _of_two(LEASED):
            rows[(path, f"evt_{24 * number}")] = LEASED._replace(token=f"{path} {number}")
    oracle.killed(Picture("ok", frozenset(event_id for _, event_id in rows), rows))
    assert [promise for promise, _ in oracle.broken] == ["leased"]


@pytest.mark.parametrize(
    ("row", "promise"),
    [
        (DELIVERED, None),
        (DELIVERED._replace(attempts=0, attempt_count=0, answered=0), "unrecorded"),
        (DELIVERED._replace(attempts=2, attempt_count=2, interrupted=1, interruptions=1), "interruptions"),
        (DELIVERED._replace(attempts=2, attempt_count=2, answered=2), "unexplained"),
        (DELIVERED._replace(state="failed"), "lost"),
        (DELIVERED._replace(state="pending"), "lost"),
    ],
)
def test_a_row_that_contradicts_what_was_seen_is_noticed(row: Row, promise: str | None) -> None:
    oracle = Oracle("/1/")
    _seen(oracle)
    oracle.drained(Picture("ok", frozenset(["evt_0"]), _of_two(row)))
    found = {name for name, _ in oracle.broken}
    assert found == set() if promise is None else promise in found


def test_an_interruption_that_is_not_counted_is_noticed() -> None:
    oracle = Oracle("/1/")
    oracle.killed(Picture("ok", frozenset(["evt_0"]), _of_two(LEASED)))
    _seen(oracle)
    oracle.drained(Picture("ok", frozenset(["evt_0"]), _of_two(DELIVERED)))
    assert {promise for promise, _ in oracle.broken} == {"interruptions"}


# -- the harness ------------------------------------------------------------------------------------------------


def test_server_and_child_end_when_the_driver_does(tmp_path: Path) -> None:
    with receiving(tmp_path / "requests.log", seed=1) as receiver, forking() as server:
        child = server.fork(
            Command("load", f"sqlite:///{tmp_path / 'hooks.db'}", f"http://127.0.0.1:{receiver.port}/1/")
        )
        assert child.hear("ack", timeout=10)
    assert "done" not in child.ended(timeout=10)


def test_the_figures_are_written_between_the_markers(tmp_path: Path) -> None:
    figures, page = Figures(random_kills=1, leased_at_kills=[7], resumed=[0.1]), tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write(page, figures, 10, "python -m tests.crash", 60.0, "SQLite")
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n`python -m tests.crash`")
    assert text.endswith(f"{table(figures, 10)}\n{END}\nafter\n")
    assert "old" not in text
