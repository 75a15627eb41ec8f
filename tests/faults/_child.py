"""The processes that faults happen to. Each scenario is a function; what it says are lines on its standard output."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import sys
import threading
import time
from typing import Any

from hookwright import (
    ConfigurationError,
    DirectTransport,
    Dispatcher,
    HttpxTransport,
    NetworkPolicy,
    Observation,
    StorageError,
)
from hookwright.storage.postgres import PostgresStorage
from tests.conftest import until
from tests.faults.fast import FastClock
from tests.faults.processes import say

NOBODY = 65534


def made(database: str, **options: Any) -> Dispatcher:
    """Return a dispatcher that may send to this machine."""
    return Dispatcher(f"sqlite:///{database}", network=NetworkPolicy.development(), keys=[], **options)


# -- one that does what it is told ------------------------------------------------------------------------------


async def serve(dispatcher: Dispatcher) -> None:
    """Do what lines on standard input say, and answer each with one."""
    loop, reader = asyncio.get_running_loop(), asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    filled: list[int] = []
    async with dispatcher:
        say("started")
        while line := (await reader.readline()).decode().split():
            say(f"{line[0]} {await do(dispatcher, line, filled)}")


async def do(dispatcher: Dispatcher, line: list[str], filled: list[int]) -> str:
    """Do one thing, and return what came of it."""
    match line:
        case ["emit", event_id]:
            return (await dispatcher.emit("video.ready", event_id=event_id)).event_id
        case ["health"]:
            return json.dumps((await dispatcher.health())._asdict())
        case ["fill"]:
            fill(filled)
        case ["free"]:
            while filled:
                os.close(filled.pop())
        case ["close"]:
            await dispatcher.aclose()
        case _:
            raise ValueError(line)
    return "done"


def fill(filled: list[int]) -> None:
    """Take every descriptor that is left."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    try:
        while True:
            filled.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return


def plain(database: str) -> None:
    """Deliver, or stand by."""
    asyncio.run(serve(made(database)))


def fast(database: str, origin: str, times: str) -> None:
    """Deliver in a time that runs faster."""
    asyncio.run(serve(made(database, clock=FastClock(int(origin), int(times)))))


def postgres(dsn: str, schema: str, origin: str, times: str) -> None:
    """Deliver from PostgreSQL, beside others, in a time that runs faster, as the server's does."""
    storage = PostgresStorage(dsn, schema=schema)
    clock, network = FastClock(int(origin), int(times)), NetworkPolicy.development()
    asyncio.run(serve(Dispatcher(storage, network=network, keys=[], clock=clock)))


def direct(database: str) -> None:
    """Deliver over DirectTransport."""
    asyncio.run(serve(made(database, transport=DirectTransport())))


def pooled(database: str) -> None:
    """Deliver over HttpxTransport."""
    asyncio.run(serve(made(database, transport=HttpxTransport())))


# -- one that forks ---------------------------------------------------------------------------------------------


def forks(database: str, ending: str) -> None:
    """Serve in a thread, and fork from the main one: what is left in the forked child is the dispatcher, in no loop."""
    dispatcher = made(database)
    serving = threading.Thread(target=lambda: asyncio.run(serve(dispatcher)))
    serving.start()
    while not dispatcher.is_delivering:
        time.sleep(0.001)
    in_a_fork(ending, lambda: asyncio.run(use(dispatcher)))
    serving.join()


def forks_inside(database: str) -> None:
    """Fork from within the loop."""

    async def main() -> None:
        dispatcher = made(database)
        serving = asyncio.ensure_future(serve(dispatcher))
        while not dispatcher.is_delivering:
            await asyncio.sleep(0.001)
        emitting = use(dispatcher)

        def inside() -> None:
            try:
                emitting.send(None)
            except StopIteration:
                return

        in_a_fork("_exit", inside)
        emitting.close()
        await serving

    asyncio.run(main())


def in_a_fork(ending: str, use_it: Any) -> None:
    """Use the dispatcher in a forked child, let that end so, and say how it ended."""
    child = os.fork()
    if child == 0:
        use_it()
        if ending == "_exit":
            os._exit(7)
        sys.exit(7)
    say(f"forked child ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}")


async def use(dispatcher: Dispatcher) -> None:
    """Emit where it cannot be, and say what that says."""
    try:
        await dispatcher.emit("video.ready")
    except ConfigurationError as error:
        say(f"refused {error}")


# -- one that may not write -------------------------------------------------------------------------------------


def nobody(database: str) -> None:
    """Start as somebody who may not write; root may write everything, and so becomes nobody for the file system."""
    os.umask(0)
    if os.geteuid() == 0:
        ctypes.CDLL(None).setfsuid(NOBODY)

    async def main() -> None:
        dispatcher = made(database)
        try:
            await dispatcher.start()
        except StorageError as error:
            say(f"refused {type(error).__name__} {error}")
        else:
            try:
                await dispatcher.emit("video.ready")
            except StorageError as error:
                say(f"refused {type(error).__name__} {error}")
        say(f"state {(await dispatcher.health()).state}")
        await dispatcher.aclose()

    asyncio.run(main())


# -- one that forgets to close ----------------------------------------------------------------------------------


def forgets(database: str, url: str, ending: str, lock: str = "") -> None:
    """Leave everything behind: deliveries to a receiver that hangs, and an observer that does."""
    dispatcher = made(database)

    async def main() -> None:
        await dispatcher.start()
        dispatcher.observe(hang)
        for number in range(2):
            await dispatcher.endpoints.create(f"{url}{number}", events=[f"for.{number}"])
        for number in range(2):
            await dispatcher.emit(f"for.{number}", event_id=f"evt_{number + 1}")
        await until(lambda: dispatcher._worker.in_flight == 2)
        say(f"in flight, health {(await dispatcher.health()).state}")
        if lock:
            await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
            waiting = asyncio.ensure_future(dispatcher.emit("for.nobody"))
            await asyncio.wait({waiting}, timeout=0.1)
            say("waiting")
        if ending == "sys_exit":
            sys.exit(3)
        if ending == "raises":
            raise RuntimeError("a defect of the application")

    if ending == "closed_loop":
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
    else:
        asyncio.run(main())


async def hang(observation: Observation) -> None:
    """Never come back."""
    await asyncio.Event().wait()


if __name__ == "__main__":
    SCENARIOS = {f.__name__: f for f in (plain, fast, postgres, direct, pooled, forks, forks_inside, nobody, forgets)}
    SCENARIOS[sys.argv[1]](*sys.argv[2:])
