"""FIPO: feature-importance prioritised orthogonal sparse autoencoders.

The core (this import) needs torch, safetensors and numpy only. `experiment.py` runs the whole job.
"""

import os

# Read by torch and what it brings, which the next lines import. Large pages, on Linux: a step's large tensors are then
# not met page by page. OpenMP's threads wait for work for 1 ms, not 16, before they sleep: ours need the cores.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from fipo.activations import BatchTopK, JumpReLU, ReLU, TopK  # noqa: E402
from fipo.config import RunConfig, Workload  # noqa: E402
from fipo.errors import UserError  # noqa: E402
from fipo.export import load_sae, save_sae  # noqa: E402
from fipo.importance import ImportanceEMA  # noqa: E402
from fipo.reservoir import PriorityReservoir  # noqa: E402
from fipo.sae import SAE  # noqa: E402
from fipo.state import TrainState, build_state  # noqa: E402
from fipo.train import train_step  # noqa: E402

__all__ = [
    "SAE",
    "BatchTopK",
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
