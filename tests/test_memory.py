"""fipo.memory: out of memory is told with what to lower; every other error passes through as it is."""

import pytest
import torch

from fipo.errors import UserError
from fipo.memory import enough_memory


def too_much():
    torch.empty(2**55)


def gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8 GiB. If reserved memory is large try")


def python():
    raise MemoryError


@pytest.mark.parametrize(
    ("call", "said"), [(too_much, "allocate"), (gpu, "Tried to allocate 8 GiB."), (python, "no mem")]
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
