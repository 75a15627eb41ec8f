"""A dispatcher in an ASGI lifespan: start it before the first request, close it after the last.

The lifespan below is what FastAPI, Starlette and Litestar take. Run as a script, it plays one start and stop, with a
receiver on this machine.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from hookwright import Dispatcher, NetworkPolicy
from hookwright.testing import Inbox

dispatcher = Dispatcher("sqlite:///hooks.db", network=NetworkPolicy.development())


@asynccontextmanager
async def lifespan(app: object) -> AsyncIterator[None]:
    async with dispatcher:
        yield


async def main() -> None:
    async with Inbox(echo=print) as inbox, lifespan(app=None):
        endpoint = await dispatcher.endpoints.create(inbox.url, events=["video.*"])
        inbox.expect(endpoint.secret)
        receipt = await dispatcher.emit("video.published", {"video_id": "vid_123"})
        await dispatcher.deliveries.wait(receipt.event_id, timeout=5)


if __name__ == "__main__":
    asyncio.run(main())
