"""When to try again: pure decisions over tenacity's strategies. Nothing here sleeps, writes or raises."""

from __future__ import annotations

import inspect
import random as random_module
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Protocol

import tenacity
from tenacity.wait import wait_base

from hookwright._clock import SECOND
from hookwright._errors import ConfigurationError, HookwrightError
from hookwright.transport._base import Response

if TYPE_CHECKING:
    from collections.abc import Callable

    from hookwright.transport._base import Failure

RETRY_AFTER_CEILING = 86_400.0
"""Seconds: a receiver may postpone a delivery by a day at most."""

STANDARD_SCHEDULE = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
"""Seconds before each attempt after the previous one's end: the Standard Webhooks specification's example (75 h)."""

_DELAY_MOST = 366 * 86_400.0
_JITTER_MOST = 900.0
_JITTER_FROM = 3


class DeliveryError(HookwrightError):
    """What a strategy's predicate sees of a failed attempt: the answer's `status` and `headers`, or an error `code`."""

    def __init__(self, code: str, response: Response | None) -> None:
        super().__init__(f"{code} {response.status}" if response is not None else code)
        self.code = code
        self.status = response.status if response is not None else None
        self.headers = dict(response.headers) if response is not None else {}


@dataclass(frozen=True)
class Succeeded:
    """The receiver accepted it."""


@dataclass(frozen=True)
class Retry:
    """Try again after `delay` microseconds."""

    delay: int


@dataclass(frozen=True)
class Failed:
    """No further attempt; `reason` is `exhausted` or `refused` (the retry predicate said no)."""

    reason: str


@dataclass(frozen=True)
class Gone:
    """410: the receiver wants nothing more, ever."""


Verdict = Succeeded | Retry | Failed | Gone

_SUCCEEDED = Succeeded()


class Random(Protocol):
    """The one thing we need of a random generator."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


class _Schedule(wait_base):
    def __init__(self, delays: tuple[float, ...], jitter: float, random: Random) -> None:
        self.delays = delays
        self.jitter = jitter
        self.random = random

    def __repr__(self) -> str:
        return f"schedule{self.delays!r}"

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        # After attempt n comes the delay before attempt n + 1; a manual retry may outlive the table: its last entry.
        position = min(retry_state.attempt_number, len(self.delays) - 1)
        delay = self.delays[position]
        if self.jitter and position + 1 >= _JITTER_FROM:
            delay += min(delay * self.jitter, _JITTER_MOST) * self.random.random()
        return delay


class RetryPolicy:
    """When a failed delivery is tried again, and when it is given up.

    `wait`, `stop` and `retry` are any of tenacity's `wait_*`, `stop_*` and `retry_if_*` strategies. They decide only:
    the time of the next attempt is stored with the delivery and survives restarts. `wait` counts from the end of the
    attempt; `stop_after_delay` from the time the event was stored. `retry` sees a `DeliveryError` as the exception,
    whose `status` is None when there was no answer. A strategy that raises is logged, and the standard policy decides.
    No wait exceeds `ceiling` seconds (default one day). A `Retry-After` answer is a floor, up to a day. 2xx succeeds
    and 410 disables the endpoint whatever the strategies say.

    Raises ConfigurationError for a strategy that is a coroutine function: its answer would always be truthy.

    ```python
    import tenacity
    from hookwright import RetryPolicy

    policy = RetryPolicy(
        wait=tenacity.wait_exponential_jitter(multiplier=2, max=3600),
        stop=tenacity.stop_after_attempt(8),
    )
    exact = RetryPolicy.schedule(0, 60, 300, 900, 1800)
    ```
    """

    def __init__(
        self,
        *,
        wait: Callable[[tenacity.RetryCallState], float],
        stop: Callable[[tenacity.RetryCallState], bool],
        retry: Callable[[tenacity.RetryCallState], bool] | None = None,
        ceiling: float = 86_400.0,
    ) -> None:
        for name, strategy in (("wait", wait), ("stop", stop), ("retry", retry)):
            _refuse_unusable(name, strategy)
        if not 0 < ceiling <= _DELAY_MOST + _JITTER_MOST:
            raise ConfigurationError("ceiling: must be more than 0 seconds, and at most a year")
        self._wait = wait
        self._stop = stop
        self._retry = retry
        self._ceiling = ceiling
        self._retrying = tenacity.AsyncRetrying(reraise=True)

    def __repr__(self) -> str:
        return f"RetryPolicy(wait={self._wait!r}, stop={self._stop!r}, retry={self._retry!r})"

    @classmethod
    def schedule(cls, *delays: float, jitter: float = 0.0, random: Random | None = None) -> RetryPolicy:
        """Return the policy with exactly these seconds before each attempt; the first is normally 0.

        `jitter` adds up to that fraction of a delay (at most 15 min) from the third attempt on; it never subtracts.
        """
        if any(isinstance(delay, bool) or not isinstance(delay, (int, float)) for delay in delays):
            raise ConfigurationError(
                "schedule: give the delays as numbers of seconds: RetryPolicy.schedule(0, 60, 300)"
            )
        if not delays or any(not 0 <= delay <= _DELAY_MOST for delay in delays) or not 0 <= jitter <= 1:
            raise ConfigurationError(
                "schedule: give one delay for each attempt, 0 seconds to a year, and a jitter from 0 to 1"
            )
        wait = _Schedule(delays, jitter, random or random_module.Random())  # noqa: S311  # spreads load, guards nothing
        ceiling = max(RETRY_AFTER_CEILING, *delays) + _JITTER_MOST
        return cls(wait=wait, stop=tenacity.stop_after_attempt(len(delays)), ceiling=ceiling)

    @classmethod
    def standard(cls, *, random: Random | None = None) -> RetryPolicy:
        """Return the default: ten attempts over 75 hours, with 10 % jitter from the third on."""
        return cls.schedule(*STANDARD_SCHEDULE, jitter=0.1, random=random)

    def judge(self, outcome: Response | Failure, *, attempt: int, age: int, now: int) -> Verdict:
        """Decide what an attempt's outcome means.

        `attempt` counts from 1 those that count against the budget; `age` is the delivery's, and `now` the wall
        clock's time (for dates in Retry-After), both in microseconds.
        """
        if isinstance(outcome, Response):
            if 200 <= outcome.status < 300:
                return _SUCCEEDED
            if outcome.status == 410:  # Standard Webhooks: "410 Gone" disables the endpoint
                return Gone()
            return self._again(DeliveryError("http_status", outcome), attempt, age, retry_after(outcome, now))
        return self._again(DeliveryError(outcome.code, None), attempt, age, 0.0)

    def _again(self, error: DeliveryError, attempt: int, age: int, floor: float) -> Retry | Failed:
        state = self._state(error, attempt, age)
        if self._retry is not None and not self._retry(state):
            return Failed("refused")
        # Wait before stop: stop_before_delay reads upcoming_sleep. An unbounded wait reaches 4.6e18 s: clamp.
        state.upcoming_sleep = max(floor, min(max(0.0, self._wait(state)), self._ceiling))
        if self._stop(state):
            return Failed("exhausted")
        return Retry(round(state.upcoming_sleep * SECOND))

    def _state(self, error: DeliveryError, attempt: int, age: int) -> tenacity.RetryCallState:
        # Constructing this by hand is not documented; tests/test_retry.py holds tenacity to it, strategy by strategy.
        state = tenacity.RetryCallState(self._retrying, None, (), {})
        state.attempt_number = attempt
        state.start_time = 0.0
        state.outcome = tenacity.Future(attempt)
        state.outcome.set_exception(error)
        state.outcome_timestamp = max(0, age) / SECOND
        return state


def _refuse_unusable(name: str, strategy: Any) -> None:
    if strategy is None and name == "retry":
        return
    if not callable(strategy):
        raise ConfigurationError(f"{name}: give one of tenacity's {name}_* strategies, not {strategy!r}")
    if inspect.iscoroutinefunction(strategy) or inspect.iscoroutinefunction(getattr(strategy, "__call__", None)):  # noqa: B004  # the method itself is looked at
        raise ConfigurationError(
            f"{name}: an async strategy cannot decide (a coroutine is always true): use a plain one"
        )


_DIGITS = re.compile(r"[0-9]{1,12}")


def retry_after(response: Response, now: int) -> float:
    """Return the seconds that `Retry-After` asks for (RFC 9110, 10.2.3), at most a day; 0 when absent or rubbish."""
    values = [value.strip() for name, value in response.headers if name.lower() == "retry-after"]
    if len(values) != 1:
        return 0.0
    if _DIGITS.fullmatch(values[0]):
        seconds = float(values[0])
    else:
        try:
            date = parsedate_to_datetime(values[0])
        except (ValueError, TypeError, IndexError, OverflowError):
            return 0.0
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        seconds = (date - datetime.fromtimestamp(now / SECOND, UTC)).total_seconds()
    return min(max(0.0, seconds), RETRY_AFTER_CEILING)
