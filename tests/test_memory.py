"""Out of memory is told with what to lower, every other error passes as it is; large tensors lie in large pages."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fipo.errors import UserError
from fipo.memory import enough_memory


def too_much():
    torch.empty(2**55)


def beyond_all_numbers():
    torch.empty(2**62, 8)


def gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. If reserved memory is large try")


def python():
    raise MemoryError


@pytest.mark.parametrize(
    ("call", "said"),
    [(too_much, "allocate"), (beyond_all_numbers, "overflow"), (gpu, "Tried to allocate 8 GiB."), (python, "no mem")],
)
def test_says_what_to_lower(call, said):
    told = pytest.raises(UserError, match=f"out of memory in training: .*{said}.*; lower workload.latents")
    with told as caught, enough_memory("training", "workload.latents"):
        call()
    assert "reserved" not in str(caught.value)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("a"), UserError("b"), KeyboardInterrupt()])
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error)) as caught, enough_memory("training", "workload.latents"):
        raise error
    assert caught.value is error


def told(program: str, arguments: list[str]) -> int:
    """The number that a program of its own prints."""
    return int(subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, check=True).stdout)


def test_large_tensors_lie_in_large_pages():
    """Of 100 MB, met once: not one fault for every 4 kB. The user's choice stands."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("the system has no large pages to give")
    program = (
        "import os, resource, sys\n"
        "if sys.argv[1:]: os.environ['THP_MEM_ALLOC_ENABLE'] = sys.argv[1]\n"
        "import torch, fipo\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "before = faults()\n"
        "torch.zeros(25_000_000).fill_(1)\n"
        "print(faults() - before)\n"
    )
    ours, refused = (told(program, choice) for choice in ([], ["0"]))
    assert ours < 5000 < 20_000 < refused


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_is_kept_for_the_next_tensors():
    """100 MB given back and asked for, again and again: no page is met anew."""
    program = (
        "import os, resource, sys\n"
        "os.environ['THP_MEM_ALLOC_ENABLE'] = '0'\n"
        "import torch\n"
        "from fipo.memory import keep_freed\n"
        "if sys.argv[1:]: keep_freed()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(4):\n"
        "    before = faults()\n"
        "    torch.empty(25_000_000).fill_(1)\n"
        "print(faults() - before)\n"
    )
    kept, given_back = (told(program, choice) for choice in (["kept"], []))
    assert kept < 100 and given_back > 20_000
