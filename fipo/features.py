"""What single latents respond to: how often they are active on a text, and where.

One pass over the text finds every active code; the rest is counting. Shapes: N tokens, D model width, F latents, P
active codes, ordered by latent, R rows of text.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fipo.data.harvest import Chunk
from fipo.pooling import pieces
from fipo.sae import SAE

LARGEST, EVENLY = 6, 4
"""Examples of a latent: texts with its largest codes, and texts evenly spaced over the ranks of all others."""
MOST_TOKENS, MOST_CODES = 65_536, 2**24
"""Tokens of a text that are read, and active codes of an SAE after which no more are: 200 MB, and four times that while
they are sorted."""
BEFORE, BEHIND = 14, 8
"""Tokens shown around the one with the largest code."""


class Example(NamedTuple):
    """A stretch of text around a token on which a latent is active."""

    codes: list[float]
    """The latent's code on each of its tokens."""
    tokens: list[int]
    """Their ids."""

    @property
    def largest(self) -> float:
        """The largest code in it."""
        return max(self.codes)


class Activity(NamedTuple):
    """Every active code of an SAE on a text."""

    code_P: Tensor
    token_P: Tensor
    """Number of the token, ascending within a latent."""
    first_F: Tensor
    """Where the codes of each latent begin, and, one entry more, where the last ones end."""
    row_N: Tensor
    """Number of the row of text each token is in, ascending."""
    id_N: Tensor
    """Token ids."""

    @property
    def tokens(self) -> int:
        """N."""
        return len(self.id_N)

    @property
    def rate_F(self) -> Tensor:
        """Share of the tokens on which each latent is active."""
        return self.first_F.diff() / self.tokens

    @property
    def mean_F(self) -> Tensor:
        """Mean code over all tokens, by which latents are ranked here: σ under `importance.norm` l1, but of this text
        and in the units of the model's activations."""
        sums_F = torch.zeros(len(self.first_F) - 1, dtype=torch.float64)
        latent_P = torch.repeat_interleave(torch.arange(len(sums_F)), self.first_F.diff())
        return sums_F.index_add_(0, latent_P, self.code_P.double()) / self.tokens

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """Codes of a latent and the tokens they are on."""
        own = slice(int(self.first_F[latent]), int(self.first_F[latent + 1]))
        return self.code_P[own], self.token_P[own]

    def examples(self, latent: int) -> list[Example]:
        """The rows of text with a latent's largest codes, and of the other rows with any some evenly spaced by their
        largest code; at most one stretch a row."""
        code_P, token_P = self.of(latent)
        row_P = self.row_N[token_P]
        order_P = code_P.argsort(descending=True, stable=True)
        order_P = order_P[row_P[order_P].argsort(stable=True)]  # by row, the largest of a row first
        first_R = torch.cat([row_P.new_ones(1), row_P[order_P].diff()]).nonzero()[:, 0] if len(order_P) else order_P
        best_R = order_P[first_R]
        best_R = best_R[code_P[best_R].argsort(descending=True, stable=True)]
        others = best_R[LARGEST:]
        evenly = torch.linspace(0, len(others) - 1, EVENLY).round().long().unique() if len(others) else others
        places = token_P[torch.cat([best_R[:LARGEST], others[evenly]])].tolist()
        return [self._around(place, code_P, token_P) for place in places]

    def _around(self, place: int, code_P: Tensor, token_P: Tensor) -> Example:
        near = slice(max(0, place - BEFORE), place + BEHIND + 1)
        own_N = (self.row_N[near] == self.row_N[place]).nonzero()[:, 0] + near.start  # a row's tokens stand together
        first, end = int(own_N[0]), int(own_N[-1]) + 1
        codes_N = torch.zeros(end - first)
        inside = slice(int(torch.searchsorted(token_P, first)), int(torch.searchsorted(token_P, end)))
        codes_N[token_P[inside] - first] = code_P[inside]
        return Example(codes_N.tolist(), self.id_N[first:end].tolist())


@torch.no_grad()
def activities(
    saes: Mapping[str, tuple[SAE, int]], chunks: Iterable[Chunk], most: int = MOST_TOKENS
) -> dict[str, Activity]:
    """Active codes of several SAEs on the first `most` tokens of a text, read once; on fewer where an SAE is so dense
    that it has MOST_CODES before. Beside each SAE the place of its layer in the chunks."""
    pairs: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in saes}
    active = dict.fromkeys(saes, 0)
    rows, ids, seen = [], [], 0
    widest, device = max(sae.latents for sae, _ in saes.values()), next(iter(saes.values()))[0].dec_FD.device
    for acts_NLD, row_N, id_N in pieces(chunks, widest, device.type):
        count = min(len(id_N), most - seen)
        for name, (sae, place) in saes.items():
            codes_NF = sae.encode(acts_NLD[:count, place].to(device))
            token_P, latent_P = (codes_NF > 0).nonzero(as_tuple=True)
            found = codes_NF[token_P, latent_P], (token_P + seen).int(), latent_P.int()
            pairs[name].append(tuple(part_P.cpu() for part_P in found))
            active[name] += len(token_P)
        rows.append(row_N[:count])
        ids.append(id_N[:count])
        seen += count
        if seen == most or max(active.values()) >= MOST_CODES:
            break
    begins_N = torch.cat(rows).diff(prepend=torch.tensor([-1])) != 0  # what stands apart is of another row
    text = begins_N.cumsum(0), torch.cat(ids)
    return {name: _by_latent(pairs.pop(name), sae.latents, *text) for name, (sae, _) in saes.items()}


def _by_latent(pairs: list[tuple[Tensor, Tensor, Tensor]], latents: int, row_N: Tensor, id_N: Tensor) -> Activity:
    """The same codes, ordered by latent, then token."""
    code_P, token_P, latent_P = (torch.cat(part) for part in zip(*pairs, strict=True))
    latent_P, order_P = latent_P.sort(stable=True)
    first_F = torch.searchsorted(latent_P, torch.arange(latents + 1, dtype=torch.int32))
    return Activity(code_P[order_P], token_P[order_P], first_F, row_N, id_N)
