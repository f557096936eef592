"""Integer arrays that grow in place: token ids and page numbers, appended to at every step.

It knows numpy and nothing else of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

TokenArray = npt.NDArray[np.int32]
PageArray = npt.NDArray[np.int64]

MIN_CAPACITY = 8
Item = TypeVar("Item", bound=np.integer)


def as_token_array(token_ids: Sequence[int] | npt.NDArray[np.integer]) -> TokenArray:
    """The ids as int32 [n]; copies unless it is such an array already. Raises OverflowError beyond 32 bits."""
    return np.asarray(token_ids, dtype=np.int32)


def as_page_array(pages: Sequence[int] | npt.NDArray[np.integer]) -> PageArray:
    """Page numbers as int64 [n]; copies unless it is such an array already."""
    return np.asarray(pages, dtype=np.int64)


def common_prefix(left: npt.NDArray[np.integer], right: npt.NDArray[np.integer]) -> int:
    """How many leading items agree."""
    length = min(len(left), len(right))
    if length == 0 or left[0] != right[0]:
        return 0
    different = left[:length] != right[:length]
    first = int(different.argmax())
    return first if different[first] else length


class GrowingArray(Generic[Item]):
    """A one-dimensional integer array of `dtype` with cheap append and truncate.

    `view` is valid until the next append; copy what must live longer.
    """

    __slots__ = ("_data", "_length")

    def __init__(self, items: Sequence[int] | npt.NDArray[np.integer], dtype: type[Item]) -> None:
        self._data: npt.NDArray[Item] = np.array(items, dtype=dtype)
        self._length = len(self._data)

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> npt.NDArray[Item]:
        """The items, without a copy."""
        return self._data[: self._length]

    def extend(self, items: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """Append `items`; amortised cost is their number."""
        length = self._length + len(items)
        if length > len(self._data):
            self._reserve(length)
        self._data[self._length : length] = items
        self._length = length

    def truncate(self, length: int) -> None:
        """Keep the first `length` items."""
        assert 0 <= length <= self._length
        self._length = length

    def drop_front(self, length: int) -> None:
        """Forget the first `length` items."""
        self._data = self._data[length : self._length].copy()
        self._length -= length

    def _reserve(self, length: int) -> None:
        grown = np.empty(max(MIN_CAPACITY, 2 * length), dtype=self._data.dtype)
        grown[: self._length] = self._data[: self._length]
        self._data = grown
