"""How the writing connection's task answers: in the order of arrival, a few callers in each turn of the loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from hookwright import ValidationFailed
from hookwright.storage.sqlite._owner import ANSWERED_AT_ONCE, Database, Owner

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from hookwright.storage.sqlite._owner import Run

CALLERS = 5 * ANSWERED_AT_ONCE + 3


@pytest.fixture
async def owner(tmp_path: Path) -> AsyncIterator[Owner]:
    owner = Owner(tmp_path / "hooks.db")
    await owner.open(lambda database: None)
    yield owner
    await owner.close()


def _same(database: Database, arguments: list[int]) -> list[int]:
    return arguments


def _refuse(database: Database, arguments: list[int]) -> list[int]:
    raise ValidationFailed("number", "none is good enough")


class _Answered:
    """In which turn of the loop each caller went on, and with what."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._turn = 0
        self.order: list[int] = []
        self.turns: list[int] = []
        self.failed: list[BaseException] = []

    def callers(self, count: int, run: Run = _same) -> list[asyncio.Task[None]]:
        """Let so many ask for something at the same time."""
        self._count()
        return [self._loop.create_task(self._ask(run, number)) for number in range(count)]

    def _count(self) -> None:
        self._turn += 1
        self._loop.call_soon(self._count)

    async def _ask(self, run: Run, number: int) -> None:
        try:
            self.order.append(await self._owner.submit_to(run, number))
        except ValidationFailed as error:
            self.failed.append(error)
        self.turns.append(self._turn)

    @property
    def at_once(self) -> int:
        """How many went on in one turn, at most."""
        return max(self.turns.count(turn) for turn in self.turns)


async def test_a_few_callers_go_on_in_one_turn_of_the_loop_in_the_order_of_their_arrival(owner: Owner) -> None:
    answered = _Answered(owner)
    await asyncio.gather(*answered.callers(CALLERS))
    assert owner.transactions == 1
    assert answered.order == list(range(CALLERS))
    assert answered.at_once == ANSWERED_AT_ONCE


async def test_who_is_answered_late_is_in_the_next_transaction_with_who_was_answered_first(owner: Owner) -> None:
    async def caller(number: int) -> None:
        for _ in range(4):
            await owner.submit_to(_same, number)

    await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    assert owner.transactions == 4


async def test_an_owner_that_is_cancelled_while_it_answers_answers_the_rest(owner: Owner) -> None:
    answered = _Answered(owner)
    tasks = answered.callers(CALLERS)
    while not answered.order:
        await asyncio.sleep(0)
    assert len(answered.order) < CALLERS
    assert owner._task is not None
    owner._task.cancel()
    await asyncio.gather(*tasks)
    assert answered.order == list(range(CALLERS))
    assert not answered.failed


async def test_closing_waits_until_all_are_answered(owner: Owner) -> None:
    answered = _Answered(owner)
    tasks = answered.callers(CALLERS)
    await asyncio.sleep(0)
    await owner.close()
    await asyncio.gather(*tasks)
    assert answered.order == list(range(CALLERS))


async def test_a_failure_of_all_is_told_a_few_in_a_turn_too(owner: Owner) -> None:
    answered = _Answered(owner)
    await asyncio.gather(*answered.callers(CALLERS, _refuse))
    assert len(answered.failed) == CALLERS
    assert answered.at_once == ANSWERED_AT_ONCE
