"""The rows of attention that an autoregressive policy yields one by one, put together to maps.

Knows no policy family; `Collector` says what is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lerobot_attn.errors import CaptureError
from lerobot_attn.policies.base import DecodedTokens, Site


class DecodedRows:
    """Collects one row a token for each site; row i is what token i attends to.

    Args:
        prefix_len: keys before the first decoded token.
        n_queries: tokens that may be decoded at most.
    """

    def __init__(self, prefix_len: int, n_queries: int):
        self._prefix_len, self._n_queries = prefix_len, n_queries
        self._rows: dict[Site, list[Tensor]] = {}

    def n_keys(self, site: Site) -> int:
        """Return how many keys the next row of a site has: it sees the tokens before it, and itself."""
        return self._prefix_len + len(self._rows.get(site, ())) + 1

    def add(self, site: Site, row: Tensor) -> None:
        """Take the next row of a site: (batch, head, 1, key)."""
        # A copy, for it may be a part of a map of all tokens.
        self._rows.setdefault(site, []).append(row.clone())

    def maps(self, site: Site, decoded: DecodedTokens, n_heads: int) -> Tensor | None:
        """Return a site's maps: (batch, head, query, key); None where rows that should be there are not.

        Keys that came later than a token are 0; the rows of tokens that were not read are NaN.

        Raises:
            CaptureError: the policy decoded another number of tokens than its description says.
        """
        rows, is_read = self._rows.get(site, []), decoded.is_read
        if is_read.shape[1] != self._n_queries:
            raise CaptureError(
                f"the policy decoded up to {is_read.shape[1]} tokens, expected {self._n_queries}; was "
                "max_decoding_steps changed while it was watched? set it in the policy's config before"
            )
        if len(rows) < int(is_read.any(dim=0).sum()):
            return None
        dtype = rows[0].dtype if rows else torch.float32
        shape = (len(is_read), n_heads, self._n_queries, self._prefix_len + self._n_queries)
        maps = torch.zeros(shape, dtype=dtype, device=is_read.device)
        for query, row in enumerate(rows):
            maps[:, :, query, : row.shape[-1]] = row[:, :, 0]
        return maps.masked_fill_(~is_read[:, None, :, None], float("nan"))


def mean_of_rows(maps: Tensor) -> Tensor:
    """Return the mean over the rows that exist, (batch, head, key) float32; NaN where none does."""
    exists = ~maps[..., :1].isnan()
    total = torch.where(exists, maps, 0).sum(dim=2, dtype=torch.float32)
    return total / exists.sum(dim=2)
