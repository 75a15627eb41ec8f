"""The deliveries of huey. `python -m benchmarks._huey FILE COUNT URL...` prints a JSON list: CPU (us) and deliveries/s.

The consumer has its own SQLite file, FULL, and its own retries. It takes a task out of the file before it runs it: one
that is running when the process dies is lost.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time

import httpx2
from huey import SqliteHuey  # type: ignore[import-untyped]
from huey.consumer import Consumer  # type: ignore[import-untyped]

from benchmarks._harness import Cost
from benchmarks._instead import signed
from benchmarks._loops import BODY

# The best rate on two cores of 1, 2, 4 and 8 processes (more wait for the file) and of 1, 2, 4, 8, 16 and 64 threads
# (which wait for the interpreter).
WORKERS = 4
TYPE = "process"


class _Consumer(Consumer):  # type: ignore[misc]  # huey has no types
    """Leaves the signals as they are: nobody here would look at what its own handlers note."""

    def _set_signal_handlers(self) -> None:
        pass


class _Sender:
    """What a task does. Each worker is a fork, and so has its own copy of a client that was made (0.2 s) before."""

    def __init__(self, count: int) -> None:
        self._client = httpx2.Client(trust_env=False, timeout=15.0)
        self._answered = multiprocessing.Array("b", count)
        self._left = multiprocessing.Value("i", count)

    @property
    def left(self) -> int:
        """How many have not been answered yet."""
        return int(self._left.value)

    def send(self, number: int, url: str, body: bytes) -> None:
        """Sign and POST; raise unless it was accepted."""
        self._client.post(url, content=body, headers=signed(f"evt_{number}", body)).raise_for_status()
        with self._left.get_lock():
            self._left.value -= 1 - self._answered[number]
            self._answered[number] = 1


def _cpu() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime


def main(file: str, count: int, urls: list[str]) -> Cost:
    """Store the tasks, then consume them; no pause between tasks is longer than it must be."""
    huey = SqliteHuey(filename=file, fsync=True)
    sender = _Sender(count)
    task = huey.task(retries=10, retry_delay=1)(sender.send)
    for number in range(count):
        task(number, urls[number % len(urls)], BODY)
    consumer = _Consumer(huey, workers=WORKERS, worker_type=TYPE, initial_delay=0.001, max_delay=0.01)
    cpu, begin = _cpu(), time.perf_counter()
    consumer.start()
    try:
        while sender.left:
            assert time.perf_counter() < begin + 120, f"{sender.left} of {count} were not answered"
            time.sleep(0.001)
        took = time.perf_counter() - begin
    finally:
        consumer.stop(graceful=True)
    return Cost((_cpu() - cpu) / count * 1e6, count / took)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])))
