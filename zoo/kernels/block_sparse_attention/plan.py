"""Which blocks are visited, and which of them need a look at their tokens."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_BITS = 8  # of a byte of a packed mask


class TokenRule(NamedTuple):
    """Query i may see key j where allowed[query[i], key[j]].

    Attributes:
        query: group of each query, int32 or int64 (n,), at least 0.
        key: group of each key, int32 or int64 (m,), at least 0.
        allowed: bool (query groups, key groups).
    """

    query: Tensor
    key: Tensor
    allowed: Tensor


class Choice(NamedTuple):
    """What is seen, as one argument of the implementations; see `block_sparse_attention`."""

    mask: Tensor | None
    rule: TokenRule | None
    key_lengths: Tensor | None
    block: tuple[int, int]
    scale: float

    def shape(self, q: Tensor, k: Tensor) -> tuple[int, int, int, int]:
        """Of the map of blocks, (b, heads, mq, mk)."""
        (b, heads, n, _), m = q.shape, k.shape[2]
        return b, heads, blocks(n, self.block[0]), blocks(m, self.block[1])

    def flat(self) -> tuple[Tensor | tuple[int, int] | float | None, ...]:
        """Arguments for an op with `CHOICE` in its schema."""
        return self.mask, *(self.rule or (None, None, None)), *self[2:]

    @classmethod
    def of(cls, flat: tuple[Any, ...]) -> "Choice":
        """Undo `flat`."""
        mask, query, key, allowed, key_lengths, block, scale = flat
        rule = None if query is None else TokenRule(query, key, allowed)
        return cls(mask, rule, key_lengths, tuple(block), scale)


CHOICE = "Tensor? mask, Tensor? query, Tensor? key, Tensor? allowed, Tensor? key_lengths, int[] block, float scale"


def blocks(n: int, size: int) -> int:
    """Blocks of `size` that hold `n` tokens."""
    return -(-n // size)


def pack_mask(mask: Tensor) -> Tensor:
    """Eight columns a byte, the first in the highest bit, as numpy.packbits has it.

    Args:
        mask: bool (..., columns).

    Returns:
        uint8 (..., ceil(columns / 8)); unused bits are 0.
    """
    bits = F.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % _BITS)).unflatten(-1, (blocks(mask.shape[-1], _BITS), 8))
    return (bits << _places(mask.device)).sum(-1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, columns: int) -> Tensor:
    """Undo `pack_mask`.

    Args:
        packed: uint8 (..., ceil(columns / 8)).
        columns: how many there were.

    Returns:
        bool (..., columns).
    """
    return ((packed[..., None] >> _places(packed.device)) & 1).flatten(-2)[..., :columns].bool()


def _places(device: torch.device) -> Tensor:
    return torch.arange(_BITS - 1, -1, -1, dtype=torch.uint8, device=device)


def words_of(mask: Tensor) -> Tensor:
    """Thirty-two columns an int32, the first in the lowest bit: (..., columns) to (..., ceil(columns / 32))."""
    bits = F.pad(mask.long(), (0, -mask.shape[-1] % 32)).unflatten(-1, (blocks(mask.shape[-1], 32), 32))
    return (bits << torch.arange(32, device=mask.device)).sum(-1).int()


def mask_of(index: Tensor, columns: int) -> Tensor:
    """Mask (..., columns) of the columns that `index`, (..., width), names; negative ones are none."""
    mask = torch.zeros(*index.shape[:-1], columns + 1, dtype=torch.bool, device=index.device)
    places = index.long()
    return mask.scatter_(-1, places.where(places >= 0, columns), True)[..., :columns]


def block_cover(rule: TokenRule, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """What a rule leaves of each block.

    Args:
        rule: which tokens see each other.
        block: queries and keys of a block.

    Returns:
        Two bool (mq, mk): blocks with at least one allowed pair, and blocks whose pairs are all allowed.
    """
    query, key = (
        _present(group, size, count)
        for group, size, count in zip((rule.query, rule.key), block, rule.allowed.shape, strict=True)
    )
    # Counts of groups stay far below 2^24, so that float32 sums of zeros and ones are exact.
    meets = lambda pairs: (query @ pairs.float() @ key.mT) > 0  # mq mk
    return meets(rule.allowed), ~meets(~rule.allowed)


def _present(group: Tensor, size: int, groups: int) -> Tensor:
    """One where a block holds a token of a group, (blocks, groups)."""
    held = torch.zeros(blocks(len(group), size), groups, device=group.device)
    held[torch.arange(len(group), device=group.device) // size, group.long()] = 1
    return held


def visits(choice: Choice, n: int, m: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """List the columns to visit by row: first those whose pairs are all seen, then the others, each ascending.

    Args:
        choice: what is seen.
        n: queries.
        m: keys.
        device: of the tokens.

    Returns:
        Lengths of the two lists, (b or 1, heads or 1, mq, 2), and all columns one after the other.
    """
    mask, rule, key_lengths, block, _ = choice
    rows, columns = blocks(n, block[0]), blocks(m, block[1])
    if mask is None:
        mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=device)
    elif mask.dtype == torch.uint8:
        mask = unpack_mask(mask, columns)
    lengths = torch.tensor([m], device=device) if key_lengths is None else key_lengths.clamp(max=m)
    left = lengths[:, None, None, None] - block[1] * torch.arange(columns, device=device)  # keys from a block on
    kept, whole = mask & (left > 0), left >= block[1]
    if rule is not None:
        some, every = block_cover(rule, block)
        kept, whole = kept & some, whole & every
    sorts = torch.stack([kept & whole, kept & ~whole], 3)  # b heads mq 2 mk
    return sorts.sum(-1), sorts.nonzero()[:, -1]
