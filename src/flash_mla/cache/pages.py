"""Which page belongs to whom: block table, free list, reference counts, copy-on-write. Integers only, no latents.

Lengths on the device are what counts; the host knows them exactly only when it waits for the device. So a row carries
two bounds, `at_least <= real length <= at_most`: pages are provided up to `at_most`, and a write may touch any page
from `at_least` on, which is why a shared page from there on is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from operator import add, gt, mul

__all__ = ["PageTable", "pages_for"]


def pages_for(num_tokens: int, block_size: int) -> int:
    """Pages that hold `num_tokens` tokens."""
    return -(-num_tokens // block_size)


class PageTable:
    """Pages of a growing pool, dealt out to rows (sequences) and shared between them by reference count.

    Page 0 is never dealt out: it takes the tokens that nobody may read (padding).

    Args:
        block_size: tokens per page.
        num_rows: rows, all empty at first.
        num_blocks: pages in the pool, page 0 included; `extend` grows it when the free list runs dry.

    Attributes:
        round_up: set where pools grow without a copy: pages that a pool has room for anyway once it has room for that
            many. None where growing copies.
        version: another number whenever the pages of some row are others than before.
    """

    def __init__(self, block_size: int, num_rows: int, num_blocks: int = 1) -> None:
        self.block_size = block_size
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.at_least = [0] * num_rows
        self.at_most = [0] * num_rows
        self.num_blocks = num_blocks
        self.round_up: Callable[[int], int] | None = None
        self.version = 0
        self.reference_counts = [1] + [0] * (num_blocks - 1)
        self._free = list(range(num_blocks - 1, 0, -1))  # popped from the end: low page numbers first
        # Whether a page may have two rows. Without a fork none has, and no row need be searched for one: where a padded
        # batch leaves `at_least` at the prompt, that search would grow with every token.
        self._forked = False

    @property
    def num_allocated(self) -> int:
        """Pages in use by at least one row, page 0 not counted."""
        return self.num_blocks - 1 - len(self._free)

    def blocks_needed(self, at_most_new: Sequence[int]) -> int:
        """Pages that `extend` would take from the free list, copies of shared pages included."""
        needed = 0
        taken: dict[int, int] = {}  # shared page -> rows that copy it away in this call
        # Once per decode step: `extend` takes 10 µs for 64 rows whose pages have room, and took 24 with a loop here.
        room = map(mul, map(len, self.rows), repeat(self.block_size))
        if any(map(gt, map(add, self.at_most, at_most_new), room)):
            for pages, held, new in zip(self.rows, self.at_most, at_most_new, strict=True):
                needed += max(0, pages_for(held + new, self.block_size) - len(pages)) if new > 0 else 0
        if self._forked:
            for row, new in enumerate(at_most_new):
                for index in self._pages_to_write(row) if new > 0 else ():
                    page = self.rows[row][index]
                    if self.reference_counts[page] - taken.get(page, 0) > 1:
                        taken[page] = taken.get(page, 0) + 1
                        needed += 1
        return needed

    def extend(self, at_least_new: Sequence[int], at_most_new: Sequence[int]) -> list[tuple[int, int]]:
        """Make room for new tokens in every row.

        A full pool that grows in place grows by what is missing, up to the end of a granule of memory (`round_up`). One
        that is copied grows by at least an eighth: each page is copied about eight times in all, and at most an eighth
        lies idle.

        Args:
            at_least_new, at_most_new: bounds of the new tokens of each row (equal when the host knows them).
        Returns: page copies (source, destination) to be made before anything is written.
        """
        needed = self.blocks_needed(at_most_new)
        if needed == 0:
            self.at_least = list(map(add, self.at_least, at_least_new))
            self.at_most = list(map(add, self.at_most, at_most_new))
            return []
        self.version += 1
        missing = needed - len(self._free)
        if missing > 0:
            if self.round_up is not None:
                self._grow(self.round_up(self.num_blocks + missing))
            else:
                self._grow(self.num_blocks + max(missing, self.num_blocks // 8))
        copies = []
        for row, new in enumerate(at_most_new):
            if new > 0:
                pages = self.rows[row]
                for index in self._pages_to_write(row):
                    shared = pages[index]
                    if self.reference_counts[shared] > 1:
                        self.reference_counts[shared] -= 1
                        pages[index] = self._take()
                        copies.append((shared, pages[index]))
                for _ in range(pages_for(self.at_most[row] + new, self.block_size) - len(pages)):
                    pages.append(self._take())
                self.at_most[row] += new
            self.at_least[row] += at_least_new[row]
        return copies

    def learn(self, lengths: Sequence[int]) -> None:
        """Replace the bounds by real lengths and give back pages beyond them."""
        for row, length in enumerate(lengths):
            if not self.at_least[row] <= length <= self.at_most[row]:
                raise ValueError(
                    f"flash_mla: row {row} holds {length} tokens on the device, "
                    f"the page table allows {self.at_least[row]}..{self.at_most[row]}"
                )
            self.truncate(row, length)
            self.at_least[row] = length

    def truncate(self, row: int, num_tokens: int) -> None:
        """Keep at most the first `num_tokens` tokens of `row`; whole pages beyond them lose this row's reference."""
        beyond = self.rows[row][pages_for(num_tokens, self.block_size) :]
        if beyond:
            self.version += 1
            for page in beyond:
                self._release(page)
            del self.rows[row][-len(beyond) :]
        self.at_most[row] = min(self.at_most[row], num_tokens)
        self.at_least[row] = min(self.at_least[row], num_tokens)

    def select(self, indices: Sequence[int]) -> None:
        """Row i becomes a copy of what row `indices[i]` was; pages are shared, nothing is copied yet."""
        self.version += 1
        self._forked = self._forked or len(set(indices)) < len(indices)
        rows = [list(self.rows[index]) for index in indices]
        for pages in rows:
            for page in pages:
                self.reference_counts[page] += 1
        for pages in self.rows:
            for page in pages:
                self._release(page)
        self.at_least = [self.at_least[index] for index in indices]
        self.at_most = [self.at_most[index] for index in indices]
        self.rows = rows

    def clear(self) -> None:
        """Empty every row; the pool keeps its size."""
        for row in range(len(self.rows)):
            self.truncate(row, 0)
        self._forked = False

    def check(self) -> None:
        """Raise ValueError if a page is leaked, freed twice, or shared without being counted."""
        counted = [0] * self.num_blocks
        counted[0] = 1
        for row, pages in enumerate(self.rows):
            if len(pages) != pages_for(self.at_most[row], self.block_size):
                raise ValueError(
                    f"flash_mla: row {row} has {len(pages)} pages of {self.block_size} for {self.at_most[row]} tokens"
                )
            for page in pages:
                counted[page] += 1
        if counted != self.reference_counts:
            pairs = enumerate(zip(self.reference_counts, counted, strict=True))
            wrong = {page: pair for page, pair in pairs if pair[0] != pair[1]}
            raise ValueError(f"flash_mla: reference counts differ from use, page: (count, uses) = {wrong}")
        if sorted(self._free) != [page for page, n in enumerate(counted) if n == 0]:
            raise ValueError(f"flash_mla: free list {sorted(self._free)} is not the list of unused pages")

    def _pages_to_write(self, row: int) -> range:
        """Places in the row's list of pages that its next write may touch and another row may hold too."""
        return range(self.at_least[row] // self.block_size, len(self.rows[row])) if self._forked else range(0)

    def _take(self) -> int:
        page = self._free.pop()
        self.reference_counts[page] = 1
        return page

    def _release(self, page: int) -> None:
        self.reference_counts[page] -= 1
        if self.reference_counts[page] == 0:
            self._free.append(page)

    def _grow(self, num_blocks: int) -> None:
        self._free[:0] = range(num_blocks - 1, self.num_blocks - 1, -1)
        self.reference_counts.extend([0] * (num_blocks - self.num_blocks))
        self.num_blocks = num_blocks
