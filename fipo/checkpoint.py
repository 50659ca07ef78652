"""Tensors on disk: flat names in one safetensors file, written whole or not at all. No pickle; knows no SAE."""

from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from fipo.errors import UserError
from fipo.files import replacing


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors atomically; views and devices do not matter."""
    with replacing(path) as temporary:
        write_tensors(temporary, tensors)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors to a path that nobody reads yet."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    owned, seen = {}, set()
    for name, tensor in plain.items():
        owned[name] = tensor.clone() if tensor.untyped_storage().data_ptr() in seen else tensor
        seen.add(tensor.untyped_storage().data_ptr())
    try:
        safetensors.torch.save_file(owned, path)
    except safetensors.SafetensorError as error:  # its name for a full disk
        raise OSError(str(error)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read what `save_tensors` wrote; a damaged file is a `UserError` that names it."""
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged or not a safetensors file: {error}; delete it and start again") from error
