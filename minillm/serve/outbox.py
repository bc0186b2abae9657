"""What threads hand to a request that waits in the event loop."""

import asyncio
from collections.abc import AsyncIterator

from minillm.models.generator import Delta

Item = tuple[int, Delta] | BaseException | None


class Outbox:
    """Deltas of a request; iterate it in the event loop that it was made in."""

    def __init__(self) -> None:
        """Begin empty."""
        self._loop = asyncio.get_running_loop()
        self._items: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item) -> None:
        """Hand over (index of the run, delta), an error, or the end (`None`); from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield until the end; raise an error that was handed over."""
        while (item := await self._items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
