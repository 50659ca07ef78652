"""Where does a cold run spend its time?

    python -m benchmarks.profile_run --json OUT.json [--run run_6] [--workload minilm]

Runs the experiment once, with an empty cache, under `cProfile`, and adds up the functions that do the work. Those named
here do not call one another, but for the few sparse products of Ω and of a refresh, which stand in both lines. What is
wanted of a run is the language model's forward pass, the products of the SAE and the probing fits:
`ratios.wanted_share` is their share of the whole.
"""

import cProfile
import os
import pstats
import tempfile
import time
from pathlib import Path

from benchmarks.common import arguments, publish
from fipo import job, runs

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
BACKWARD = "~:<method 'run_backward' of 'torch._C._EngineBase' objects>"
"""The backward pass but for our own functions in it: of dense codes its products, of sparse ones what is left."""
WANTED = {
    "LM forward": ["lm.py:activations"],
    "SAE: encoder product": ["sae.py:pre_codes", "sparse.py:affine"],
    "SAE: sparse products (decode, levels, gradients, Ω)": [
        *("sparse.py:sum_rows", "sparse.py:row_products", "loss.py:nested_error"),
    ],
    "probing: product of the screen": ["screen.py:_left"],
    "probing: selection and fits": ["probing.py:sparse_answers", "probing.py:full_accuracies"],
}
DENSE = {"SAE: dense decode": ["decoding.py:decode"], "SAE: dense backward": [BACKWARD]}
SPARSE = {"step: rest of the backward pass": [BACKWARD]}
OTHER = {
    "step: search of the largest": ["search.py:largest_of_batch", "search.py:largest_of_rows"],
    "step: pairs sorted by latent and by level": ["sparse.py:grouped"],
    "step: levels, without Numba": ["objective.py:passes"],
    "step: candidate pairs": ["train.py:refresh_pairs"],
    "step: reservoir and revival": ["reservoir.py:offer", "train.py:revive_dead"],
    "step: gradient norm and optimiser": ["update.py:update"],
    "step: importance": ["importance.py:collect", "importance.py:commit", "importance.py:values"],
    "log and measures: mean max cosine": ["metrics.py:max_cosines"],
    "shuffle buffer": ["buffer.py:next_batch"],
    "checkpoints": ["loop.py:save"],
    "activation cache: checked and written": ["harvest.py:_check_finite", "store.py:flush"],
    "training texts read and told apart": ["sae_probes.py:_training_texts"],
    "tokenising": ["~:<method 'encode_batch' of 'tokenizers.Tokenizer' objects>"],
    "set-up: model, texts, imports": ["lm.py:__init__", "labelled.py:load_labelled"],
    "picture and tables": ["job.py:finish"],
}


def seconds_of(profile: cProfile.Profile, names: list[str]) -> float:
    """Seconds in these functions, `file:function`, and all that they call; of one built in, its own alone."""
    stats = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    return sum(
        own if file == "~" else whole
        for (file, _line, function), (_, _, own, whole, _) in stats.items()
        if f"{Path(file).name}:{function}" in names and (file == "~" or "fipo" in file or "torch" in file)
    )


def own_seconds(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds of every function of ours without the Python functions that it calls, largest first."""
    own: dict[str, float] = {}
    for (file, _line, _function), (_, _, seconds, _, callers) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        shares = (
            {caller: found[2] for caller, found in callers.items()}
            if file == "~"
            else {(file, _line, _function): seconds}
        )
        for (whose, _, name), share in shares.items():
            if Path(whose).parent.name in ("fipo", "data"):
                place = f"{Path(whose).name}:{name}"
                own[place] = own.get(place, 0.0) + share
    return dict(sorted(own.items(), key=lambda item: -item[1]))


def main() -> None:
    """Run, add up and publish."""
    given = arguments(__doc__, run="run_6", workload="minilm")
    profile = cProfile.Profile()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ |= {"FIPO_CACHE": f"{temporary}/cache", "FIPO_WORKLOAD": given.workload}
        out_dir = Path(temporary) / given.run
        dense = runs.resolve(out_dir, EXPERIMENTS).architecture in ("relu", "jumprelu")
        started = time.perf_counter()
        profile.runcall(job.run, out_dir, EXPERIMENTS)
        whole = time.perf_counter() - started
    rows, wanted = [], 0.0
    for parts, is_wanted in ((WANTED | (DENSE if dense else {}), True), (OTHER | ({} if dense else SPARSE), False)):
        for part, names in parts.items():
            seconds = seconds_of(profile, names)
            wanted += seconds if is_wanted else 0.0
            rows.append({"part": part, "seconds": seconds, "share": seconds / whole, "wanted": is_wanted})
    rest = whole - sum(row["seconds"] for row in rows)
    rows.append({"part": "everything else", "seconds": rest, "share": rest / whole, "wanted": False})
    rows.append({"part": "all", "seconds": whole, "share": 1.0, "wanted": None})
    rows += [
        {"function, without those it calls": name, "seconds": seconds, "share": seconds / whole}
        for name, seconds in list(own_seconds(profile).items())[:20]
    ]
    publish(
        "profile_run",
        rows,
        {"wanted_share": wanted / whole},
        given.json,
        {"run": given.run, "workload": given.workload},
    )


if __name__ == "__main__":
    main()
