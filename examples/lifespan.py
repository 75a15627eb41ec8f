"""A dispatcher in an ASGI lifespan: start it before the first request, close it after the last.

The lifespan below is what FastAPI, Starlette and Litestar take. A dispatcher lives once: making it in the lifespan lets
an application be started again, as a test suite does for every test. Run as a script, it plays two lives, with a
receiver on this machine.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hookwright import Dispatcher, NetworkPolicy
from hookwright.testing import Inbox


class State:
    hooks: Dispatcher


class App:
    """Stands for a framework's application."""

    state = State()


@asynccontextmanager
async def lifespan(app: App) -> AsyncIterator[None]:
    async with Dispatcher("sqlite:///hooks.db", network=NetworkPolicy.development()) as app.state.hooks:
        yield


async def publish(app: App, video_id: str) -> None:
    """What a route does."""
    receipt = await app.state.hooks.emit("video.published", {"video_id": video_id})
    await app.state.hooks.deliveries.wait(receipt.event_id, timeout=5)


async def main() -> None:
    app = App()
    async with Inbox(echo=print) as inbox:
        async with lifespan(app):
            endpoint = await app.state.hooks.endpoints.create(inbox.url, events=["video.*"])
            inbox.expect(endpoint.secret)
            await publish(app, "vid_123")
        async with lifespan(app):
            await publish(app, "vid_124")


if __name__ == "__main__":
    asyncio.run(main())
