"""The sparse autoencoder.

    x = (acts - mean) · scale             standardise: zero mean, mean squared norm D
    a = act(x encᵀ + enc_bias)            codes, non-negative and sparse
    x̂ = a dec + dec_bias                  decoder rows are the dictionary, of unit norm

Shapes: B tokens, D width of the model activation, F latents. Decoder rows have unit norm after every step, so that a
code is the length of what its latent adds, and codes of different latents can be compared. There is no `x - dec_bias`
before the encoder (mean-centring does that work, and it would cost a matrix product in the backward pass).
"""

import torch
from torch import Tensor, nn

from fipo.activations import Activation
from fipo.decoding import decode
from fipo.sparse import Codes, affine, attach, cached, pairs_of, working, working_times


class SAE(nn.Module):
    """One dictionary for one layer. The activation is a part passed in (fipo.activations)."""

    mean_D: Tensor
    scale: Tensor

    def __init__(
        self, d_in: int, latents: int, activation: Activation, *, gain: float = 1.0, generator: torch.Generator
    ) -> None:
        """Random unit decoder rows; the encoder is their transpose times `gain`."""
        super().__init__()
        dec_FD = torch.randn(latents, d_in, generator=generator)
        dec_FD /= dec_FD.norm(dim=1, keepdim=True)
        self.dec_FD = nn.Parameter(dec_FD)
        self.enc_FD = nn.Parameter(gain * dec_FD)  # a latent's weights side by side, as its gradient comes
        self.enc_bias_F = nn.Parameter(torch.zeros(latents))
        self.dec_bias_D = nn.Parameter(torch.zeros(d_in))
        self.activation = activation
        self.register_buffer("mean_D", torch.zeros(d_in))
        self.register_buffer("scale", torch.ones(()))

    @property
    def d_in(self) -> int:
        """D, the width of the model activation."""
        return self.dec_FD.shape[1]

    @property
    def latents(self) -> int:
        """F, the dictionary size."""
        return self.dec_FD.shape[0]

    def standardise(self, acts_BD: Tensor) -> Tensor:
        """Model activations [B, D] in the SAE's own dtype, mean-centred, of mean squared norm D."""
        return (acts_BD.to(self.mean_D.dtype) - self.mean_D).mul_(self.scale)

    def pre_codes(self, x_BD: Tensor, latents_N: Tensor | None = None) -> Tensor:
        """Pre-activations [B, F] of standardised input, or [B, N] of the given latents alone."""
        if latents_N is not None:
            return torch.addmm(self.enc_bias_F[latents_N], x_BD, self.enc_FD[latents_N].T)
        return torch.addmm(self.enc_bias_F, x_BD, self.enc_FD.T)

    def training_codes(
        self, x_BD: Tensor, k: int, favour_F: Tensor | None = None
    ) -> tuple[Tensor | None, Codes | Tensor]:
        """Pre-activations and codes [B, F] of standardised input, `k` a token where the activation has such a budget,
        for which codes vie times `favour_F`; of a sparse activation only the codes, as pairs."""
        vying = {"k": k} if favour_F is None else {"k": k, "favour_F": favour_F}
        if not self.activation.sparse:
            pre_BF = self.pre_codes(x_BD)
            return pre_BF, self.activation(pre_BF if favour_F is None else pre_BF * favour_F, **vying)
        with torch.no_grad():
            x_BD, encoder = working(x_BD), (self.enc_FD, self.enc_bias_F)
            if favour_F is not None:
                encoder = working_times(self.enc_FD, favour_F), self.enc_bias_F * favour_F
            codes = self.activation(affine(x_BD, *encoder), as_pairs=True, **vying)
        return None, attach(codes, x_BD, self.enc_FD, self.enc_bias_F)

    def reconstruct(self, codes: Codes | Tensor) -> Tensor:
        """Standardised reconstruction [B, D] of codes [B, F], or of their pairs."""
        if self.activation.sparse and not isinstance(codes, Codes):
            codes = pairs_of(codes)
        return decode(codes, self.dec_FD) + self.dec_bias_D

    def encode(self, acts_BD: Tensor) -> Tensor:
        """Codes [B, F] of model activations; B may be several dimensions, or none."""
        flat_BD = acts_BD.reshape(-1, self.d_in)
        codes_BF = self.activation(self.pre_codes(self.standardise(flat_BD)))
        return codes_BF.view(*acts_BD.shape[:-1], self.latents)

    def decode(self, codes_BF: Tensor) -> Tensor:
        """Model activations [B, D] of codes; B as there."""
        acts_BD = self.reconstruct(codes_BF.reshape(-1, self.latents)) / self.scale + self.mean_D
        return acts_BD.view(*codes_BF.shape[:-1], self.d_in)

    def forward(self, acts_BD: Tensor) -> Tensor:
        """decode(encode(acts))."""
        return self.decode(self.encode(acts_BD))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Make all codes `factor` times as large, and keep the same ones."""
        self.enc_FD.mul_(factor)
        self.enc_bias_F.mul_(factor)
        self.activation.rescale(factor)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Return every decoder row to unit norm (call after each optimiser step)."""
        for rows_ND in cached(self.dec_FD):
            rows_ND /= rows_ND.norm(dim=1, keepdim=True).clamp_min(1e-12)

    @torch.no_grad()
    def project_decoder_gradient(self) -> None:
        """Take from the decoder's gradient its part along each row, which the next normalisation would undo."""
        if self.dec_FD.grad is None:
            return
        for grad_ND, rows_ND in zip(cached(self.dec_FD.grad), cached(self.dec_FD), strict=True):
            grad_ND.addcmul_((grad_ND * rows_ND).sum(dim=1, keepdim=True), rows_ND, value=-1)
