"""How an application tests its webhooks: no network, no waiting, three days in a moment.

Run it as a script, or let pytest find the test.
"""

import asyncio
import json
from datetime import timedelta

from hookwright import DeliveryFailed, Dispatcher
from hookwright.testing import FakeTransport, VirtualClock


class Shop:
    """An application that tells its partners about orders."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.pages: list[str] = []
        dispatcher.observe(self._page, DeliveryFailed)

    async def sell(self, item: str) -> None:
        await self._dispatcher.emit("order.paid", {"item": item})

    def _page(self, failed: DeliveryFailed) -> None:
        self.pages.append(failed.reason)


async def test_a_partner_that_is_down_for_days_is_told_at_last_or_we_are_paged() -> None:
    clock = VirtualClock()
    transport = FakeTransport([503, 503, 200])
    async with Dispatcher("memory:", clock=clock, transport=transport) as dispatcher:
        shop = Shop(dispatcher)
        await dispatcher.endpoints.create("https://partner.example/hooks", events=["order.*"])

        await shop.sell("book")
        await clock.advance(timedelta(minutes=10), settle=dispatcher.drain)
        assert len(transport.requests) == 3
        assert json.loads(transport.requests[2].body)["data"] == {"item": "book"}

        transport.respond("https://partner.example/hooks", 500)
        await shop.sell("lamp")
        await clock.advance(timedelta(days=4), settle=dispatcher.drain)
        assert shop.pages == ["exhausted"]


if __name__ == "__main__":
    asyncio.run(test_a_partner_that_is_down_for_days_is_told_at_last_or_we_are_paged())
    print("told, or paged")
