"""Where a result comes from: git revision, library versions, hardware."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

LIBRARIES = ("torch", "numpy", "numba", "safetensors", "transformers", "datasets", "tokenizers", "pyarrow", "fipo-sae")


def git_revision() -> str:
    """Commit of the source tree, with `-dirty` when package or benchmarks have uncommitted changes; "Unknown" outside a
    checkout, and where the package is installed below somebody else's."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", Path(__file__).name)
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--", ".", ":/benchmarks/*.py") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "Unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of what is installed of `LIBRARIES`."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(device: str) -> dict[str, Any]:
    """Processor, cores, threads and, where used, the GPU."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}


def provenance() -> dict[str, Any]:
    """What every result file carries beside its config and seed."""
    return {"git_revision": git_revision(), "versions": versions()}
