"""The requests that wait, in the order in which they get their turn: tenants one after the other, first come first.

A tenant that sends a hundred requests waits for its own; one that sends a single request waits for one round. It has a
deque's methods, so that whoever admits from it need not know about tenants.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator

from chatserve.engine.request import Request


class WaitingQueue:
    """Round robin over tenants by their salts. With one tenant it is a plain queue."""

    def __init__(self) -> None:
        self._by_tenant: OrderedDict[bytes, deque[Request]] = OrderedDict()  # the first tenant's turn is next
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Request]:
        """All requests in the order in which `popleft` would give them."""
        rounds = [iter(requests) for requests in self._by_tenant.values()]
        while rounds:
            still_there = []
            for requests in rounds:
                request = next(requests, None)
                if request is not None:
                    yield request
                    still_there.append(requests)
            rounds = still_there

    def append(self, request: Request) -> None:
        """Behind what its tenant has waiting; a tenant that had nothing comes after the others."""
        self._by_tenant.setdefault(request.salt, deque()).append(request)
        self._length += 1

    def popleft(self) -> Request:
        """Take the oldest request of the tenant whose turn it is; the next turn is the next tenant's."""
        salt, requests = next(iter(self._by_tenant.items()))
        request = requests.popleft()
        self._length -= 1
        if requests:
            self._by_tenant.move_to_end(salt)
        else:
            del self._by_tenant[salt]
        return request

    def appendleft(self, request: Request) -> None:
        """Put back what was taken, or what has to give way: it is next, whoever's turn it was."""
        self._by_tenant.setdefault(request.salt, deque()).appendleft(request)
        self._by_tenant.move_to_end(request.salt, last=False)
        self._length += 1

    def extendleft(self, requests: Iterable[Request]) -> None:
        """Put several back, one after the other: the last one is next."""
        for request in requests:
            self.appendleft(request)

    def remove(self, request: Request) -> None:
        """Take a request out wherever it stands. Raises ValueError where it does not wait."""
        requests = self._by_tenant.get(request.salt, deque())
        requests.remove(request)
        self._length -= 1
        if not requests:
            del self._by_tenant[request.salt]
