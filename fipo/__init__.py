"""FIPO: feature-importance prioritised orthogonal sparse autoencoders.

The core (this import) needs torch, safetensors and numpy only. `experiment.py` runs the whole job.
"""

import os

from fipo.activations import BatchTopK, JumpReLU, ReLU, TopK
from fipo.config import RunConfig, Workload
from fipo.errors import UserError
from fipo.export import load_sae, save_sae
from fipo.importance import ImportanceEMA
from fipo.reservoir import BucketQueues, PriorityReservoir
from fipo.sae import SAE
from fipo.state import TrainState, build_state
from fipo.train import train_step

# PyTorch asks for large pages once it allocates, on Linux: the pages of a step's large tensors are then not met one by
# one, a fifth of the time of a step at F = 16,384.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__all__ = [
    "SAE",
    "BatchTopK",
    "BucketQueues",
    "ImportanceEMA",
    "JumpReLU",
    "PriorityReservoir",
    "ReLU",
    "RunConfig",
    "TopK",
    "TrainState",
    "UserError",
    "Workload",
    "build_state",
    "load_sae",
    "save_sae",
    "train_step",
]
