"""The page allocator and the cache against a list of lists: nothing leaked, nothing shared by mistake, no token lost.

`FLASH_MLA_OPERATIONS=1000000 pytest tests/test_pages.py` runs a million operations; 10,000 by default.
"""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DeepseekV3Config

from flash_mla import PagedLatentCache
from flash_mla.cache.pages import PageTable, pages_for

OPERATIONS = int(os.environ.get("FLASH_MLA_OPERATIONS", "10000"))
STEPS = 50
BLOCK = 16
MAX_ROWS = 6


def machine_settings(share: float) -> settings:
    """Settings under which a machine runs `share` of the operations."""
    return settings(
        max_examples=max(1, int(OPERATIONS * share) // STEPS),
        stateful_step_count=STEPS,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


class PageMachine(RuleBasedStateMachine):
    """PageTable against the tokens that each page should hold, written the way a layer writes them."""

    @initialize(num_rows=st.integers(1, 4), num_blocks=st.integers(1, 5), granule=st.sampled_from((None, 1, 7)))
    def start(self, num_rows: int, num_blocks: int, granule: int | None) -> None:
        self.table = PageTable(BLOCK, num_rows, num_blocks)
        if granule is not None:
            self.table.round_up = lambda pages: pages_for(pages, granule) * granule
        self.expected: list[list[int]] = [[] for _ in range(num_rows)]
        self.memory: dict[int, list[int | None]] = {}
        self.token = 0

    def write(self, at_least_new: list[int], at_most_new: list[int], real: list[int]) -> None:
        free = self.table.num_blocks - 1 - self.table.num_allocated
        needed = self.table.blocks_needed(at_most_new)
        before = self.table.num_allocated
        copies = self.table.extend(at_least_new, at_most_new)
        assert self.table.num_allocated - before == needed, "blocks_needed must say what extend takes"
        assert needed <= free or self.table.num_blocks > free
        for source, destination in copies:
            self.memory[destination] = list(self.memory.get(source, [None] * BLOCK))
        for row, new in enumerate(real):
            for _ in range(new):
                position = len(self.expected[row])
                page = self.table.rows[row][position // BLOCK]
                self.memory.setdefault(page, [None] * BLOCK)[position % BLOCK] = self.token
                self.expected[row].append(self.token)
                self.token += 1

    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        rows = len(self.table.rows)
        new = data.draw(st.lists(st.integers(0, 40), min_size=rows, max_size=rows))
        self.table.learn([len(tokens) for tokens in self.expected])
        self.write(new, new, new)

    @rule(data=st.data())
    def append_unknown(self, data: st.DataObject) -> None:
        """One token or none per row, and the host does not know which."""
        rows = len(self.table.rows)
        real = data.draw(st.lists(st.integers(0, 1), min_size=rows, max_size=rows))
        self.write([0] * rows, [1] * rows, real)

    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        rows = len(self.table.rows)
        indices = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=MAX_ROWS))
        self.table.select(indices)
        self.expected = [list(self.expected[index]) for index in indices]

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = data.draw(st.integers(0, len(self.expected) - 1))
        kept = data.draw(st.integers(0, len(self.expected[row])))
        self.table.truncate(row, kept)
        del self.expected[row][kept:]
        self.table.at_least[row] = kept

    @rule()
    def clear(self) -> None:
        self.table.clear()
        self.expected = [[] for _ in self.expected]
        assert self.table.num_allocated == 0

    @invariant()
    def every_token_is_where_its_row_looks(self) -> None:
        if not hasattr(self, "table"):
            return
        self.table.check()
        for row, tokens in enumerate(self.expected):
            assert self.table.at_least[row] <= len(tokens) <= self.table.at_most[row]
            found = [self.memory[self.table.rows[row][i // BLOCK]][i % BLOCK] for i in range(len(tokens))]
            assert found == tokens
            assert 0 not in self.table.rows[row], "page 0 takes padding and belongs to nobody"


PageMachine.TestCase.settings = machine_settings(0.6)
TestPageTable = PageMachine.TestCase


def small_config() -> DeepseekV3Config:
    config = DeepseekV3Config(num_hidden_layers=2, kv_lora_rank=8, qk_rope_head_dim=4, num_attention_heads=2)
    config._attn_implementation = "flash_mla"
    return config


class CacheMachine(RuleBasedStateMachine):
    """PagedLatentCache against lists: each position holds a token number, or None where it is padding."""

    max_cache_len: int | None = None

    @initialize(num_rows=st.integers(1, 4), repeats=st.sampled_from([1, 1, 2, 3]))
    def start(self, num_rows: int, repeats: int) -> None:
        num_rows *= repeats
        self.repeats = repeats
        self.cache = PagedLatentCache(
            small_config(), block_size=BLOCK, max_cache_len=self.max_cache_len, prompt_repeats=repeats
        )
        self.expected: list[list[int | None]] = [[] for _ in range(num_rows)]
        self.token = 1

    @property
    def seen(self) -> int:
        return len(self.expected[0])

    @rule(data=st.data(), seqlen_q=st.sampled_from([1, 1, 1, 2, 7, 16, 33]), padded=st.booleans(), same=st.booleans())
    def append(self, data: st.DataObject, seqlen_q: int, padded: bool, same: bool) -> None:
        """`same`: the rows of a group are given the same tokens, as `generate` gives them one prompt."""
        batch = len(self.expected)
        count = batch * seqlen_q
        real = data.draw(st.lists(st.booleans(), min_size=count, max_size=count)) if padded else [True] * count
        valid = torch.tensor(real).view(batch, seqlen_q)
        numbers = torch.arange(self.token, self.token + count).view(batch, seqlen_q)
        if same and batch % self.repeats == 0:
            leaders = torch.arange(0, batch, self.repeats).repeat_interleave(self.repeats)
            numbers, valid = numbers[leaders], valid[leaders]
        if self.max_cache_len is not None and self.seen + seqlen_q > self.max_cache_len:
            with pytest.raises(ValueError, match=f"{self.max_cache_len} positions are the capacity"):
                self.store(numbers, valid if padded else None)
            return
        self.store(numbers, valid if padded else None)
        for row in range(batch):
            self.expected[row] += [
                int(number) if ok else None for number, ok in zip(numbers[row], valid[row], strict=True)
            ]
        self.token += count

    def store(self, numbers: torch.Tensor, valid: torch.Tensor | None) -> None:
        for index in range(2):
            latent = (numbers + index / 4).float()[:, None, :, None].expand(-1, 1, -1, 8)
            handle, _ = self.cache.update(latent, latent[..., :4] + 0.125, index)
            handle.layer.write(handle, valid)

    def rows_of(self, indices: list[int]) -> None:
        self.expected = [list(self.expected[index]) for index in indices]

    @precondition(lambda self: self.seen > 0)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        batch = len(self.expected)
        indices = data.draw(st.lists(st.integers(0, batch - 1), min_size=batch, max_size=batch))
        self.cache.reorder_cache(torch.tensor(indices))
        self.rows_of(indices)

    @precondition(lambda self: self.seen > 0 and self.max_cache_len is None)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        batch = len(self.expected)
        repeats = data.draw(st.integers(1, max(1, MAX_ROWS // batch)))
        self.cache.batch_repeat_interleave(repeats)
        self.rows_of([row for row in range(batch) for _ in range(repeats)])

    @precondition(lambda self: self.seen > 0 and self.max_cache_len is None)
    @rule(data=st.data())
    def keep(self, data: st.DataObject) -> None:
        batch = len(self.expected)
        indices = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch))
        self.cache.batch_select_indices(torch.tensor(indices))
        self.rows_of(indices)

    @precondition(lambda self: self.seen > 0)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        removed = data.draw(st.integers(0, self.seen))
        self.cache.crop(-removed)
        self.expected = [tokens[: self.seen - removed] for tokens in self.expected]

    @precondition(lambda self: self.seen > 0)
    @rule(beyond=st.integers(1, 5))
    def crop_too_much(self, beyond: int) -> None:
        with pytest.raises(ValueError, match=f"got -{self.seen + beyond}"):
            self.cache.crop(-(self.seen + beyond))

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.expected = [[] for _ in self.expected]

    @invariant()
    def the_cache_holds_what_was_stored(self) -> None:
        if not hasattr(self, "cache") or not self.cache.layers[0].is_initialized:
            return
        report = self.cache.memory_report()  # validates as well
        tokens = [[token for token in row if token is not None] for row in self.expected]
        assert int(self.cache.get_seq_length()) == self.seen
        assert report.tokens_used == sum(map(len, tokens))
        assert report.tokens_padded == len(self.expected) * self.seen
        if self.max_cache_len is None:
            assert report.pages_allocated <= sum(pages_for(len(row) + STEPS, BLOCK) for row in tokens)
        for index, layer in enumerate(self.cache.layers):
            latent, k_rope = layer.gather()
            wanted = torch.tensor([[0 if t is None else t + index / 4 for t in row] for row in self.expected])
            here = wanted.shape[1]
            real = wanted != 0
            assert torch.equal(latent[:, 0, :here, 0], wanted.float())
            assert torch.equal(k_rope[:, 0, :here, 3], torch.where(real, wanted + 0.125, 0).float())


class FixedMachine(CacheMachine):
    """The same with a capacity: filling up raises before anything is written."""

    max_cache_len = 70


CacheMachine.TestCase.settings = machine_settings(0.2)
FixedMachine.TestCase.settings = machine_settings(0.2)
TestGrowingCache = CacheMachine.TestCase
TestFixedCache = FixedMachine.TestCase


def test_a_pool_that_is_copied_grows_by_an_eighth_and_one_that_is_not_to_the_end_of_its_granule():
    sizes = {}
    for round_up in (None, lambda pages: pages_for(pages, 28) * 28):
        table = PageTable(BLOCK, 1, num_blocks=160)
        table.round_up = round_up
        table.extend([159 * BLOCK], [159 * BLOCK])
        assert table.num_blocks == 160, "full, and nothing is missing"
        grown = []
        for _ in range(40):
            table.extend([BLOCK], [BLOCK])
            grown.append(table.num_blocks)
        table.extend([100 * BLOCK], [100 * BLOCK])
        table.check()
        sizes[round_up is None] = (grown[0], grown[39], table.num_blocks)
    assert sizes[True] == (160 + 20, 180 + 22, 300)
    assert sizes[False] == (6 * 28, 8 * 28, 11 * 28)
