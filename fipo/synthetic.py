"""Ground truth without a language model: activations composed of known sparse features, as in SynthSAEBench.

    acts = bias + Σ_G value_G feature_G       feature rows of unit norm, nearly orthogonal

Statistically the model of `sae_lens.synthetic` (its parameters for 16,384 features are the defaults here):

- feature r of the Zipf order fires with p_r ∝ r^-e, rescaled to [p_min, p_max];
- features correlate through a Gaussian copula: r fires where z_R·factor_r + noise > Φ⁻¹(1 - p_r), one z a token;
- a fired feature has the value relu(N(mean_r, std_r));
- the first features form trees: a child fires only with its parent, of its siblings only one fires, and its value is
  multiplied by the parent's over the parent's mean. Chances of children are raised so that they keep about p_r.

What differs: children are drawn only where their parent fired, which is the same distribution at a third of the
draws, and the dictionary is orthogonalised through VᵀV, at O(G D²) a step in place of O(G² D).

Truth and data have generators of their own, and neither may be the SAE's: an SAE that draws the numbers of the truth
starts at the solution. Shapes: B tokens, G true features, D width, R rank of the correlation, K children a parent,
T features without a parent, N (token, feature) pairs that fired in a batch.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fipo.records import require


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What a ground-truth model is like."""

    features: int = 1024
    """G, true features."""
    width: int = 256
    """D, width of the activations."""
    roots: int | None = None
    """Trees; None: one for 128 features."""
    branching: int = 4
    """K, children of a feature that has any."""
    depth: int = 3
    """Generations below a root."""
    exponent: float = 0.5
    """e of the Zipf law."""
    largest_chance: float = 0.4
    """Chance of the most frequent feature to fire."""
    smallest_chance: float = 5e-4
    """Chance of the rarest one."""
    rank: int = 25
    """R, rank of the correlation of firing."""
    correlation: float = 0.1
    """Standard deviation of the correlation's factors."""
    first_mean: float = 5.0
    """Mean value of the most frequent feature; falls linearly to `last_mean`."""
    last_mean: float = 4.0
    """Mean value of the rarest feature."""
    spread: float = 0.5
    """Standard deviations of the values are |N(spread, spread)|."""
    bias: float = 0.5
    """Norm of the bias."""
    orthogonal_steps: int = 100
    """Steps of Adam that make the dictionary more orthogonal."""
    orthogonal_rate: float = 3e-4
    """Rate of these steps."""

    def __post_init__(self) -> None:
        require(self.features > 1, "truth.features (G)", self.features, "at least 2 features")
        require(self.width > 1, "truth.width (D)", self.width, "a width of at least 2")
        require(self.roots is None or 0 < self.roots <= self.features, "truth.roots", self.roots, "1 to G trees")
        require(self.branching > 0, "truth.branching", self.branching, "a positive number of children")
        require(self.depth >= 0, "truth.depth", self.depth, "zero or more generations")
        require(self.exponent > 0, "truth.exponent", self.exponent, "a positive exponent")
        chances = (self.smallest_chance, self.largest_chance)
        require(0 < chances[0] < chances[1] < 1, "truth.*_chance", chances, "0 < smallest < largest < 1")
        require(self.rank > 0, "truth.rank", self.rank, "a positive rank")
        require(self.correlation >= 0, "truth.correlation", self.correlation, "zero or more")
        require(self.spread > 0, "truth.spread", self.spread, "a positive spread")


class Sample(NamedTuple):
    """Tokens with what they are made of: value_N times feature_N at token_N."""

    acts_BD: Tensor
    """Activations."""
    token_N: Tensor
    """Token of every feature that fired."""
    feature_N: Tensor
    """Its number."""
    value_N: Tensor
    """Its value, positive but for the rarest chance of 0."""
    features: int
    """G."""

    @property
    def values_BG(self) -> Tensor:
        """Values of all true features; 0 where one did not fire."""
        values_BG = torch.zeros(len(self.acts_BD), self.features, device=self.acts_BD.device)
        values_BG[self.token_N, self.feature_N] = self.value_N
        return values_BG


@dataclass(frozen=True)
class SyntheticModel:
    """The truth; `sample` draws tokens of it and changes nothing."""

    features_GD: Tensor
    """True directions, unit norm."""
    bias_D: Tensor
    """Added to every token."""
    chance_G: Tensor
    """Chance to fire, given that the parent (if any) fired, before siblings exclude one another."""
    mean_G: Tensor
    """Mean value where fired."""
    std_G: Tensor
    """Standard deviation of the value."""
    factor_GR: Tensor
    """Loadings of firing on the shared factors."""
    children_GK: Tensor
    """Children of every feature, -1 where there are fewer than K."""

    @property
    def parent_G(self) -> Tensor:
        """Parent of every feature, -1 where it has none."""
        parent_G = torch.full(self.mean_G.shape, -1, device=self.mean_G.device)
        real_GK = self.children_GK >= 0
        parent_G[self.children_GK[real_GK]] = real_GK.nonzero()[:, 0]
        return parent_G

    def state_dict(self) -> dict[str, Tensor]:
        """The whole model as named tensors, for `fipo.checkpoint.save_tensors`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def to(self, device: str) -> "SyntheticModel":
        """The same model on another device; its generators must be of that device."""
        return SyntheticModel(**{name: tensor.to(device) for name, tensor in self.state_dict().items()})

    @torch.no_grad()
    def sample(self, tokens: int, generator: torch.Generator) -> Sample:
        """`tokens` tokens; the same generator state gives the same ones."""
        device, (features, rank) = self.factor_GR.device, self.factor_GR.shape
        threshold_G = math.sqrt(2) * torch.erfinv(1 - 2 * self.chance_G)
        own_G = (1 - self.factor_GR.pow(2).sum(1)).sqrt()
        shared_BR = torch.randn(tokens, rank, generator=generator, device=device)

        def value_of(feature: Tensor) -> Tensor:
            noise = torch.randn(feature.shape, generator=generator, device=device)
            return (self.mean_G[feature] + self.std_G[feature] * noise).relu()

        top_T = (self.parent_G < 0).nonzero().squeeze(1)
        noise_BT = torch.randn(tokens, len(top_T), generator=generator, device=device)
        latent_BT = torch.addmm(noise_BT * own_G[top_T], shared_BR, self.factor_GR[top_T].T)
        token_N, place_N = (latent_BT > threshold_G[top_T]).nonzero(as_tuple=True)
        feature_N = top_T[place_N]
        fired = [(token_N, feature_N, value_of(feature_N))]
        while fired[-1][0].numel():
            token_N, feature_N, value_N = fired[-1]
            parent_N = ((self.children_GK[feature_N, 0] >= 0) & (value_N > 0)).nonzero().squeeze(1)
            token_N, feature_N = token_N[parent_N], feature_N[parent_N]
            growth_N = value_N[parent_N] / self.mean_G[feature_N]
            child_NK = self.children_GK[feature_N]
            real_NK, child_NK = child_NK >= 0, child_NK.clamp_min(0)
            noise_NK = torch.randn(child_NK.shape, generator=generator, device=device)
            latent_NK = torch.einsum("nr,nkr->nk", shared_BR[token_N], self.factor_GR[child_NK])
            value_NK = value_of(child_NK)
            on_NK = real_NK & (latent_NK + own_G[child_NK] * noise_NK > threshold_G[child_NK]) & (value_NK > 0)
            lot_NK = torch.rand(child_NK.shape, generator=generator, device=device)
            winner_N1 = lot_NK.masked_fill(~on_NK, -1).argmax(1, keepdim=True)
            born_N = on_NK.any(1).nonzero().squeeze(1)
            child_N, value_N = (part_NK.gather(1, winner_N1)[born_N, 0] for part_NK in (child_NK, value_NK))
            fired.append((token_N[born_N], child_N, value_N * growth_N[born_N]))
        token_N, feature_N, value_N = map(torch.cat, zip(*fired, strict=True))
        token_N, order_N = token_N.sort()
        feature_N, value_N = feature_N[order_N], value_N[order_N]
        starts_B = torch.searchsorted(token_N, torch.arange(tokens, device=device))
        acts_BD = embedding_bag(feature_N, self.features_GD, starts_B, mode="sum", per_sample_weights=value_N)
        return Sample(acts_BD + self.bias_D, token_N, feature_N, value_N, features)

    def batches(self, tokens: int, batch: int, generator: torch.Generator) -> Iterator[Sample]:
        """Samples of `batch` tokens, `tokens` in all."""
        for start in range(0, tokens, batch):
            yield self.sample(min(batch, tokens - start), generator)


def build(truth: Truth, generator: torch.Generator) -> SyntheticModel:
    """A ground-truth model; all of its chance comes from `generator`."""
    features, width = truth.features, truth.width
    rows_GD = torch.randn(features, width, generator=generator)
    bias_D = torch.randn(width, generator=generator)
    factor_GR = truth.correlation * torch.randn(features, truth.rank, generator=generator)
    factor_GR *= (0.99 / factor_GR.pow(2).sum(1, keepdim=True)).sqrt().clamp_max(1)  # a share of its own is left
    std_G = (truth.spread + truth.spread * torch.randn(features, generator=generator)).abs()
    zipf_G = torch.arange(1, features + 1, dtype=torch.float64).pow(-truth.exponent)
    share_G = (zipf_G - zipf_G[-1]) / (zipf_G[0] - zipf_G[-1])
    chance_G = truth.smallest_chance + (truth.largest_chance - truth.smallest_chance) * share_G
    children_GK = _forest(truth)
    return SyntheticModel(
        features_GD=orthogonalise(rows_GD, truth.orthogonal_steps, truth.orthogonal_rate),
        bias_D=truth.bias * bias_D / bias_D.norm(),
        chance_G=_raised(chance_G, children_GK).float(),
        mean_G=torch.linspace(truth.first_mean, truth.last_mean, features),
        std_G=std_G,
        factor_GR=factor_GR,
        children_GK=children_GK,
    )


def orthogonalise(rows_GD: Tensor, steps: int, rate: float) -> Tensor:
    """Unit rows after `steps` of Adam on Σ_{i≠j} ⟨v_i, v_j⟩² + G Σ_i (‖v_i‖² - 1)².

    The first sum is ‖VᵀV‖² - Σ ‖v_i‖⁴, a D x D product.
    """
    rows_GD = (rows_GD / rows_GD.norm(dim=1, keepdim=True)).detach().requires_grad_(True)
    adam = torch.optim.Adam([rows_GD], lr=rate)
    for _ in range(steps):
        square_G = rows_GD.pow(2).sum(1)
        overlap = (rows_GD.T @ rows_GD).pow(2).sum() - square_G.pow(2).sum()
        adam.zero_grad()
        (overlap + len(rows_GD) * (square_G - 1).pow(2).sum()).backward()
        adam.step()
    rows_GD = rows_GD.detach()
    return rows_GD / rows_GD.norm(dim=1, keepdim=True)


def _forest(truth: Truth) -> Tensor:
    """Children [G, K]: roots are the first features, then generation by generation; the rest stands alone."""
    features, branching = truth.features, truth.branching
    children_GK = torch.full((features, branching), -1)
    start, end = 0, truth.roots or max(1, features // 128)
    for _ in range(truth.depth):
        parents = torch.arange(start, end)
        children_NK = end + torch.arange(len(parents) * branching).unflatten(0, (len(parents), branching))
        children_GK[parents] = children_NK.masked_fill(children_NK >= features, -1)
        start, end = end, min(features, end + len(parents) * branching)
    return children_GK


def _raised(chance_G: Tensor, children_GK: Tensor) -> Tensor:
    """Chances given the parent, p_child / p_parent · (1 + Σ_siblings p / p_parent): after siblings have excluded one
    another about p_child is left. At most 1."""
    real_GK = children_GK >= 0
    share_GK = chance_G[children_GK.clamp_min(0)] * real_GK / chance_G[:, None]
    siblings_GK = share_GK.sum(1, keepdim=True) - share_GK
    raised_G = chance_G.clone()
    raised_G[children_GK[real_GK]] = (share_GK * (1 + siblings_GK))[real_GK]
    return raised_G.clamp_max(1)


def from_saelens(model: Any) -> SyntheticModel:
    """A model of `sae_lens.synthetic.SyntheticModel` (6.54), whose parents all exclude and scale their children."""
    dictionary, values = model.feature_dict, model.activation_generator
    children: dict[int, list[int]] = {}
    waiting = list(model.hierarchy.roots)
    while waiting:
        node = waiting.pop()
        waiting += node.children
        if node.children:
            alike = node.scale_children_by_parent and (node.mutually_exclusive_children or len(node.children) == 1)
            require(alike, "feature", node.feature_index, "children that exclude one another and scale with it")
            children[node.feature_index] = [child.feature_index for child in node.children]
    most = max(map(len, children.values()))
    rows = [children.get(g, []) for g in range(len(values.mean_firing_magnitudes))]
    return SyntheticModel(
        features_GD=dictionary.feature_vectors.detach().clone(),
        bias_D=dictionary.bias.detach().clone(),
        chance_G=values.firing_probabilities.clone(),
        mean_G=values.mean_firing_magnitudes.clone(),
        std_G=values.std_firing_magnitudes.clone(),
        factor_GR=model.correlation_matrix.correlation_factor.clone(),
        children_GK=torch.tensor([row + [-1] * (most - len(row)) for row in rows]),
    )
