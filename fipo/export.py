"""Saved SAEs, in SAELens' on-disk format: a folder with `sae_weights.safetensors` and `cfg.json`.

Everything about the training space is folded into the weights, so a saved SAE takes raw activations and gives raw
activations, with unit-norm decoder rows. With x = (acts - μ)·c in training:

    W_enc = enc    b_enc = enc_bias / c + dec_bias enc / c    W_dec = dec    b_dec = μ + dec_bias / c

(SAELens encodes acts - b_dec, hence the second summand.) Codes come out in raw units, and thresholds are divided by
c. `batchtopk` is saved as `jumprelu` with its learned thresholds, as SAELens does. Importance and statistics lie in a
file beside it, since SAELens refuses unknown tensors. Nothing is ever unpickled.

SAEs from elsewhere may have decoder rows of any norm. Reading one brings them to unit norm and its codes into units of
the activations, as SAEBench does: W_enc, b_enc and threshold times ‖W_dec_F‖, which changes no reconstruction.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipo.activations import Activation, BatchTopK, JumpReLU, ReLU, TopK
from fipo.checkpoint import load_tensors, save_tensors
from fipo.errors import UserError
from fipo.files import read_json, write_json
from fipo.progress import say
from fipo.sae import SAE

SAELENS_VERSION = "6.54.12"
"""The version of SAELens whose format this is; without it in the file SAELens reads an older format."""

READ = ("standard", "topk", "jumprelu")
"""Architectures of saved SAEs. SAELens saves a batchtopk as jumprelu."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes in which weights may be saved."""
READING = "decoder norms folded"
"""How saved SAEs are read; goes into the keys of what is kept of their codes, and changes when the codes do."""


@torch.no_grad()
def fold(sae: SAE) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Architecture name, tensors and architecture fields in SAELens' terms, in raw-activation units."""
    scale = sae.scale.double()
    norm_F = sae.dec_FD.double().norm(dim=1).clamp_min(1e-12)
    enc_DF = sae.enc_FD.double().T * norm_F
    tensors = {
        "W_enc": enc_DF,
        "b_enc": (sae.enc_bias_F.double() * norm_F + sae.dec_bias_D.double() @ enc_DF) / scale,
        "W_dec": sae.dec_FD.double() / norm_F[:, None],
        "b_dec": sae.mean_D.double() + sae.dec_bias_D.double() / scale,
    }
    architecture, fields = "standard", {}
    match sae.activation:
        case TopK(k=k):
            architecture, fields = "topk", {"k": k, "rescale_acts_by_decoder_norm": True}
        case BatchTopK(threshold_F=threshold_F) | JumpReLU(threshold_F=threshold_F):
            architecture = "jumprelu"
            tensors["threshold"] = threshold_F.double() * norm_F / scale
    return architecture, {name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()}, fields


def save_sae(
    folder: Path | str,
    sae: SAE,
    *,
    model: str,
    layer: int,
    context: int,
    dataset: str,
    beside: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Write the SAE and, in `fipo_statistics.safetensors`, the tensors `beside`; returns the content of cfg.json."""
    folder = Path(folder)
    architecture, tensors, fields = fold(sae)
    config = {
        "d_in": sae.d_in,
        "d_sae": sae.latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "architecture": architecture,
        **fields,
        "metadata": {
            "sae_lens_version": SAELENS_VERSION,
            "sae_lens_training_version": None,
            "model_name": model,
            "hook_name": f"blocks.{layer}.hook_resid_post",
            "hook_layer": layer,
            "hook_head_index": None,
            "context_size": context,
            "prepend_bos": True,
            "exclude_special_tokens": True,
            "dataset_path": dataset,
            "seqpos_slice": [None],
            "model_class_name": "AutoModel",
            "model_from_pretrained_kwargs": {},
            "neuronpedia_id": None,
        },
    }
    save_tensors(folder / "sae_weights.safetensors", tensors)
    save_tensors(folder / "fipo_statistics.safetensors", beside or {})
    write_json(folder / "cfg.json", config)
    return config


def load_sae(folder: Path | str) -> SAE:
    """An SAE in SAELens' format as ours: raw activations in, raw activations out, decoder rows of unit norm (but for a
    topk whose choice of latents that would change, which is warned of); in evaluation mode."""
    folder = Path(folder)
    config, tensors = read_json(folder / "cfg.json"), load_tensors(folder / "sae_weights.safetensors")
    if not isinstance(config, dict):
        raise UserError(f"{folder}/cfg.json holds no mapping; expected an SAE in SAELens' format")
    architecture = _field(folder, config, "architecture", str)
    if architecture not in READ:
        raise UserError(f"{folder}/cfg.json: architecture is {architecture[:100]}; expected one of {', '.join(READ)}")
    for key in ("activation_fn", "activation_fn_str"):  # SAELens before version 6 kept TopK as `standard`
        if architecture == "standard" and config.get(key, "relu") != "relu":
            raise UserError(
                f"{folder}/cfg.json: {key} of a standard SAE is {repr(config[key])[:100]}; expected relu: save it anew "
                "in the format of SAELens 6"
            )
    width, latents = _field(folder, config, "d_in", int), _field(folder, config, "d_sae", int)
    shapes = {"W_enc": (width, latents), "b_enc": (latents,), "W_dec": (latents, width), "b_dec": (width,)}
    shapes |= {"threshold": (latents,)} if architecture == "jumprelu" else {}
    rescaled = _field(folder, {"rescale_acts_by_decoder_norm": False} | config, "rescale_acts_by_decoder_norm", bool)
    weights = _checked_weights(folder, tensors, shapes)
    weights = _unit_rows(folder, weights, foldable=architecture != "topk" or rescaled)
    weights = _checked_weights(folder, weights, shapes)
    for key in ("normalize_activations", "reshape_activations"):
        if config.get(key, "none") != "none":
            raise UserError(f"{folder}: {key} is not folded into the weights; fold it before saving")
    sae = SAE(width, latents, _activation(folder, architecture, config, weights), generator=torch.Generator())
    centred = _field(folder, {"apply_b_dec_to_input": True} | config, "apply_b_dec_to_input", bool)
    with torch.no_grad():
        sae.enc_FD.copy_(weights["W_enc"].T)
        sae.enc_bias_F.copy_(weights["b_enc"])
        sae.dec_FD.copy_(weights["W_dec"])
        (sae.mean_D if centred else sae.dec_bias_D).copy_(weights["b_dec"])
    return sae.eval()


def _field(folder: Path, config: dict[str, Any], key: str, kind: type) -> Any:
    """A value of cfg.json, of exactly this type; numbers are positive."""
    if key not in config:
        raise UserError(f"{folder}/cfg.json lacks '{key}'; expected an SAE in SAELens' format")
    value = config[key]
    if type(value) is not kind or (kind is int and value < 1):
        raise UserError(f"{folder}/cfg.json: {key} is {repr(value)[:100]}; expected {kind.__name__}")
    return value


def _checked_weights(folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors as float32, when they are those expected: by name, floating point, shape, and finite."""
    for name in sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{folder}: tensor {name} is unknown; expected {', '.join(shapes)}")
    weights = {}
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is not None and tensor.dtype in FLOATS and tuple(tensor.shape) == shape:
            weights[name] = tensor.float()
        if name not in weights or not weights[name].isfinite().all():
            given = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
            raise UserError(f"{folder}: tensor {name} is {given} or not finite; expected finite {shape}")
    return weights


def _unit_rows(folder: Path, weights: dict[str, Tensor], *, foldable: bool) -> dict[str, Tensor]:
    """The same SAE with decoder rows of unit norm, those of ours bit for bit. Not `foldable`: left as it is."""
    norm_F = torch.linalg.vector_norm(weights["W_dec"], dim=1, dtype=torch.float64)
    if not foldable:
        other_F = (norm_F - 1).abs() > 1e-2
        if other_F.any():
            say(
                f"warning: {int(other_F.sum())} decoder rows of {folder} are not of unit norm (up to "
                f"{norm_F.max().item():.3g}), and folding them would change which latents topk chooses: its codes are "
                "probed in their own units; train with rescale_acts_by_decoder_norm, or compare with care"
            )
        return weights
    norm_F = torch.where((norm_F - 1).abs() < 1e-5, 1, norm_F.clamp_min(1e-8)).float()  # as SAELens: nothing by 0
    folded = {name: weights[name] * norm_F for name in ("W_enc", "b_enc", "threshold") if name in weights}
    return weights | folded | {"W_dec": weights["W_dec"] / norm_F[:, None]}


def _activation(folder: Path, architecture: str, config: dict[str, Any], weights: dict[str, Tensor]) -> Activation:
    latents = config["d_sae"]
    match architecture:
        case "standard":
            return ReLU()
        case "topk":
            if (k := _field(folder, config, "k", int)) > latents:
                raise UserError(f"{folder}/cfg.json: k is {k}; expected at most d_sae, {latents}")
            return TopK(k)
        case "jumprelu":
            activation = JumpReLU(latents)
            activation.log_threshold_F.data.copy_(weights["threshold"].clamp_min(1e-30).log())
            return activation
    raise AssertionError(architecture)
