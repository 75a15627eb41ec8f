"""RetryPolicy: tenacity's strategies decide, and what we hand them is what they read (a contract, since the state that
they are given is constructed by hand)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import tenacity

from hookwright import ConfigurationError, Failure, Response, RetryPolicy
from hookwright._retry import Failed, Gone, Retry, Succeeded, retry_after

NOW = 1_767_225_600_000_000
DAY = 86_400


def judge(policy: RetryPolicy, attempt: int = 1, age: float = 0, outcome: Any = None) -> Any:
    return policy.judge(outcome or Response(500), attempt=attempt, age=round(age * 1e6), now=NOW)


def waits(wait: Any, *attempts: int) -> list[float]:
    policy = RetryPolicy(wait=wait, stop=tenacity.stop_never)
    return [judge(policy, attempt).delay / 1e6 for attempt in attempts]


@pytest.mark.parametrize("status", range(200, 300, 33))
def test_2xx_succeeds_and_410_is_gone_whatever_the_strategies_say(status: int) -> None:
    policy = RetryPolicy(wait=tenacity.wait_none(), stop=tenacity.stop_after_attempt(1))
    assert judge(policy, outcome=Response(status)) == Succeeded()
    assert judge(policy, outcome=Response(410)) == Gone()
    assert judge(policy, outcome=Response(307)) == Failed("exhausted")


def test_every_wait_strategy_reads_what_we_hand_it() -> None:
    assert waits(tenacity.wait_fixed(7), 1, 9) == [7, 7]
    assert waits(tenacity.wait_incrementing(1, 2), 1, 2, 3) == [1, 3, 5]
    assert waits(tenacity.wait_exponential(multiplier=2, max=60), 1, 2, 5, 9) == [2, 4, 32, 60]
    assert waits(tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_fixed(9)), 1, 2, 3) == [1, 9, 9]
    assert waits(tenacity.wait_fixed(1) + tenacity.wait_fixed(2), 1) == [3]
    assert waits(tenacity.wait_combine(tenacity.wait_fixed(1), tenacity.wait_none()), 1) == [1]
    assert 0 <= waits(tenacity.wait_random_exponential(max=3), 4)[0] <= 3
    assert 1 <= waits(tenacity.wait_exponential_jitter(multiplier=1, max=8), 1)[0] <= 2
    assert 1 <= waits(tenacity.wait_random(1, 2), 1)[0] <= 2
    by_error = tenacity.wait_exception(lambda error: error.status / 100)  # type: ignore[attr-defined]  # a DeliveryError
    assert waits(by_error, 1) == [5]


def test_an_unbounded_or_negative_wait_is_held_within_zero_and_the_ceiling() -> None:
    assert waits(tenacity.wait_exponential(), 60) == [DAY]
    assert waits(lambda state: -5, 1) == [0]
    policy = RetryPolicy(wait=tenacity.wait_fixed(99), stop=tenacity.stop_never, ceiling=10)
    assert judge(policy) == Retry(10_000_000)


def test_every_stop_strategy_reads_what_we_hand_it() -> None:
    def stops(stop: Any, attempt: int = 1, age: float = 0) -> bool:
        return isinstance(judge(RetryPolicy(wait=tenacity.wait_fixed(10), stop=stop), attempt, age), Failed)

    assert [stops(tenacity.stop_after_attempt(3), n) for n in (1, 2, 3, 4)] == [False, False, True, True]
    assert [stops(tenacity.stop_after_delay(60), age=age) for age in (59, 60)] == [False, True]
    assert [stops(tenacity.stop_before_delay(60), age=age) for age in (49, 50)] == [False, True]
    either = tenacity.stop_after_attempt(3) | tenacity.stop_after_delay(60)
    both = tenacity.stop_after_attempt(3) & tenacity.stop_after_delay(60)
    assert (stops(either, 1, 70), stops(both, 1, 70), stops(both, 3, 70)) == (True, False, True)


def test_every_retry_strategy_reads_what_we_hand_it() -> None:
    def retries(retry: Any, outcome: Any) -> bool:
        policy = RetryPolicy(wait=tenacity.wait_none(), stop=tenacity.stop_never, retry=retry)
        return isinstance(judge(policy, outcome=outcome), Retry)

    on_timeout = tenacity.retry_if_exception(lambda error: getattr(error, "code", "") == "timeout")
    assert retries(on_timeout, Failure("timeout"))
    assert not retries(on_timeout, Failure("dns_error"))
    busy = tenacity.retry_if_exception_message(match="http_status 5..")
    assert [retries(busy, Response(status)) for status in (500, 404)] == [True, False]
    assert retries(tenacity.retry_if_exception_type(), Response(404))
    assert not retries(tenacity.retry_never, Response(500))
    assert not retries(tenacity.retry_if_result(bool), Response(500))


def test_a_schedule_is_exact() -> None:
    policy = RetryPolicy.schedule(0, 60, 300, 900, 1800)
    assert [judge(policy, n) for n in (1, 2, 3, 4)] == [Retry(n * 1_000_000) for n in (60, 300, 900, 1800)]
    assert judge(policy, 5) == Failed("exhausted")


def test_jitter_is_only_added_from_the_third_attempt_on_and_at_most_a_quarter_of_an_hour() -> None:
    class Full:
        def random(self) -> float:
            return 1.0

    policy = RetryPolicy.schedule(0, 100, 100, 100_000, jitter=0.1, random=Full())
    assert [judge(policy, n).delay / 1e6 for n in (1, 2, 3)] == [100, 110, 100_900]


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        (["120"], 120),
        ([" 5 "], 5),
        (["Thu, 01 Jan 2026 00:02:00 GMT"], 120),
        (["Thu, 01 Jan 2026 00:02:00 -0000"], 120),
        (["Thu, 01 Jan 2020 00:00:00 GMT"], 0),
        (["999999999"], DAY),
        (["Thu, 01 Jan 2099 00:00:00 GMT"], DAY),
        (["-1"], 0),
        (["1e9"], 0),
        (["NaN"], 0),
        (["1" + "0" * 400], 0),
        (["soon"], 0),
        (["Thu, 99 Jan 2026 00:00:00 GMT"], 0),
        (["5", "6"], 0),
        ([], 0),
    ],
)
def test_retry_after_is_read_as_the_rfc_says_and_rubbish_is_ignored(values: list[str], seconds: float) -> None:
    assert datetime.fromtimestamp(NOW / 1e6, UTC) == datetime(2026, 1, 1, tzinfo=UTC)
    response = Response(503, tuple(("Retry-After", value) for value in values))
    assert retry_after(response, NOW) == seconds
    policy = RetryPolicy(wait=tenacity.wait_fixed(1), stop=tenacity.stop_never)
    assert judge(policy, outcome=response) == Retry(round(max(1, seconds) * 1e6))


async def _async_strategy(state: Any) -> bool:
    return True


class _AsyncCall:
    async def __call__(self, state: Any) -> bool:
        return True


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"retry": _async_strategy}, "async"),
        ({"stop": _AsyncCall()}, "async"),
        ({"wait": 5}, "wait_"),
        ({"stop": None}, "stop_"),
        ({"ceiling": 0}, "ceiling"),
    ],
)
def test_strategies_that_cannot_decide_are_refused(settings: dict[str, Any], says: str) -> None:
    usable: dict[str, Any] = {"wait": tenacity.wait_none(), "stop": tenacity.stop_never}
    with pytest.raises(ConfigurationError, match=says):
        RetryPolicy(**(usable | settings))


@pytest.mark.parametrize(("delays", "jitter"), [((), 0), ((-1,), 0), ((float("nan"),), 0), ((1,), 2)])
def test_schedules_that_are_none_are_refused(delays: tuple[float, ...], jitter: float) -> None:
    with pytest.raises(ConfigurationError, match="schedule"):
        RetryPolicy.schedule(*delays, jitter=jitter)
