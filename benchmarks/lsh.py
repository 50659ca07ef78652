"""The plan's third claim: LSH projection under AMP autocast takes 50 % less memory. And are its codes the same?

    python -m benchmarks.lsh [--json OUT]

The projection of F decoder rows onto T·S planes, as many as the defaults have, in float32 and under `torch.autocast`
(bfloat16): peak of the memory allocated while it runs beyond what was there before, time, and the share of the F·T·S
sign bits that are the same.
"""

import sys

import torch

from benchmarks.common import arguments, command, interleaved, publish
from fipo.config import LSH
from fipo.lsh import bucket_numbers, project


def peak_bytes(work: object) -> int:
    """Most bytes held at a time by tensors that `work` allocated."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()  # type: ignore[operator]
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()  # type: ignore[operator]
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def row(latents: int, width: int) -> dict[str, object]:
    """One shape."""
    tables, bits = LSH().tables, LSH().bits_of(latents)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    unit_FD = torch.nn.functional.normalize(torch.randn(latents, width, generator=generator), dim=1).to(device)
    planes_DTS = torch.randn(width, tables, bits, generator=generator).to(device)
    jobs = {
        "float32": lambda: project(unit_FD, planes_DTS, autocast=False),
        "autocast": lambda: project(unit_FD, planes_DTS, autocast=True),
    }
    seconds = interleaved(jobs, 20)
    memory = {name: peak_bytes(job) for name, job in jobs.items()}
    codes = [bucket_numbers(unit_FD, planes_DTS, autocast) for autocast in (False, True)]
    signs = [jobs[name]() > 0 for name in jobs]
    return {
        "shape": f"F={latents:,} D={width} T={tables} S={bits}",
        "float32 MiB": memory["float32"] / 2**20,
        "autocast MiB": memory["autocast"] / 2**20,
        "memory ratio": memory["autocast"] / memory["float32"],
        "time ratio": seconds["autocast"] / seconds["float32"],
        "same bits": (signs[0] == signs[1]).double().mean().item(),
        "same buckets": (codes[0] == codes[1]).double().mean().item(),
    }


def main() -> None:
    """Measure and publish."""
    given = arguments(__doc__)
    rows = [row(3072, 384), row(16_384, 768), row(65_536, 2304)]
    ratios = {}
    for one, name in zip(rows, ("minilm", "16k", "65k"), strict=True):
        ratios |= {f"{name}_{key.replace(' ', '_')}": float(one[key]) for key in list(one)[3:]}  # type: ignore[arg-type]
    publish("lsh", rows, ratios, given.json)


if __name__ == "__main__":
    sys.exit(command(main))
