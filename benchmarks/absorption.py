"""How much of a word class is absorbed by other latents: SAEBench's `absorption`, on running text.

    .venv/bin/python -m benchmarks.absorption --json OUT results/seed_*/run_6 results/seed_*/run_8 results/seed_*/run_9

A class (words in -ing, numbers, words with one first letter) is a parent, each of its words a child. SAEBench asks for
first letters of words in a prompt that spells them, which only large models know. Here the classes are those whose
probe has an F1 above .6 on words that it was not trained on, however few, and the words are the whole words of text
behind that which the runs held out and trained on, each up to `--each` times. A probe on the activations, centred and
brought to unit scale, finds every class; classes are rare and, unlike letters there, not weighted to one half. The
latents that detect it are those whose mean code is larger in it by most (there: by an L1 probe); of these, as many are
main ones as each raise by more than .03 the F1 of a logistic regression on their codes over the SAE's mean code. Then,
on the test words that are of the class and found by the probe, what `fipo.absorption` says. Classes overlap, and what
is found hangs on the probes (`--decay`) and on how much text they have: compare SAEs of one call alone.
"""

import argparse
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.common import command, publish, ready
from fipo.absorption import absorbed, main_latents
from fipo.config import Text
from fipo.data.harvest import first_rows, harvest
from fipo.data.lm import LanguageModel
from fipo.data.text import open_text
from fipo.errors import UserError
from fipo.evaluate import check_fits, load_subject
from fipo.names import sparsity_of, told_apart
from fipo.randomness import generator_for
from fipo.records import from_dict, require
from fipo.sae import SAE
from fipo.saved import DTYPES, Saved, find_saved, load_model
from fipo.suite_table import mean_and_error
from fipo.uncertainty import spread

ENDINGS = ("ing", "ed", "ly", "s", "est", "er", "tion", "al", "able", "ness", "ity", "ous", "ic", "y")
LONG = 5
"""Letters at least of a word that counts as one with an ending; others are in no class of endings, nor outside it."""
LEAST_F1 = 0.6
"""F1 of its probe at least with which a class is one that the model knows (SAEBench)."""
LEAST_WORDS = 10
"""Different words that a class has at least, among those trained on and among those tested on."""
MOST_MAIN = 10
"""Main latents of a class at most."""
MEASURES = ("absorbed in full", "absorbed fraction", "main latents silent", "main latents", "F1, one latent", "F1")
Row = dict[str, Any]


class Words(NamedTuple):
    """Whole words of a text."""

    acts_NLD: Tensor
    words: list[str]


class Concept(NamedTuple):
    """A class that the model knows."""

    name: str
    is_N: Tensor
    """Is the word of the class?"""
    counts_N: Tensor
    """Does it count, in it or outside it?"""
    found_N: Tensor
    """Does the probe find the class?"""
    probe_D: Tensor
    f1: float


def classes() -> dict[str, tuple[Callable[[str], bool], Callable[[str], bool]]]:
    """Name of a class -> which words are of it, and which count at all."""
    found: dict[str, tuple[Callable[[str], bool], Callable[[str], bool]]] = {
        "number": (str.isdigit, bool),
        "year": (lambda word: word.isdigit() and len(word) == 4 and word[0] in "12", bool),
    }
    for ending in ENDINGS:
        found[f"-{ending}"] = (lambda word, ending=ending: word.endswith(ending), lambda word: len(word) >= LONG)
    for letter in string.ascii_lowercase:
        found[f"{letter}-"] = (lambda word, letter=letter: word.startswith(letter), str.isalpha)
    return found


def whole_words(pieces: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Place and lower-case form of every token of a row that is a whole word of letters or digits, of what each token
    adds to the text. The first and the last word of a row may be cut and count as none."""
    for place in range(1, len(pieces) - 1):
        before, piece, following = pieces[place - 1 : place + 2]
        word = piece.strip().lower()
        whole = not (before[-1:].isalnum() and piece[:1].isalnum()) and not following[:1].isalnum()
        if whole and word.isascii() and (word.isalpha() or word.isdigit()):
            yield place, word


def read_words(lm: LanguageModel, text: Text, tokens: int, each: int) -> Words:
    """Of `tokens` tokens behind those that a run on this text holds out and trains on, the first `each` of a word."""
    rows = (lm.packed_rows if text.packed else lm.token_rows)(open_text(text).texts())
    for before in (text.held_out_tokens, text.tokens):
        for _ in first_rows(rows, lm, before):
            pass
    seen: Counter[str] = Counter()
    kept, words = [], []
    for chunk in harvest(lm, first_rows(rows, lm, tokens)):
        start, places = 0, []
        for ids_S in chunk.token_N.split(chunk.text_N.unique_consecutive(return_counts=True)[1].tolist()):
            for place, word in whole_words(lm.pieces(ids_S.tolist())):
                if seen[word] < each:
                    seen[word] += 1
                    places.append(start + place)
                    words.append(word)
            start += len(ids_S)
        kept.append(chunk.acts_NLD[places].float().cpu())
    if not words:
        raise UserError("the text has no whole words behind what was trained on; give another by --text")
    return Words(torch.cat(kept), words)


def fit_probes(x_ND: Tensor, is_NC: Tensor, counts_NC: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and biases [C] of C logistic regressions, each on the words that count for its class, with half
    the squared norm of its weights times `decay` added to the mean loss."""
    weight_CD = torch.zeros(is_NC.shape[1], x_ND.shape[1], requires_grad=True)
    bias_C = torch.zeros(is_NC.shape[1], requires_grad=True)
    share_NC = counts_NC.float() / counts_NC.sum(0)
    search = torch.optim.LBFGS([weight_CD, bias_C], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        logits_NC = x_ND @ weight_CD.T + bias_C
        total = binary_cross_entropy_with_logits(logits_NC, is_NC.float(), weight=share_NC, reduction="sum")
        total = total + decay / 2 * weight_CD.square().sum()
        total.backward()
        return total

    search.step(loss)
    return weight_CD.detach(), bias_C.detach()


def f1_score(is_N: Tensor, found_N: Tensor) -> float:
    """Harmonic mean of precision and recall; 0 where nothing is found."""
    return 2 * int((is_N & found_N).sum()) / max(1, int(is_N.sum() + found_N.sum()))


def memberships(words: Sequence[str], train_N: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Name of every class with enough different words -> which words are of it, and which count."""
    of_all = {
        name: (torch.tensor([is_of(word) for word in words]), torch.tensor([bool(counts(word)) for word in words]))
        for name, (is_of, counts) in classes().items()
    }
    enough = {name: of for name, of in of_all.items() if _enough(words, of[0] & of[1], train_N)}
    if not enough:
        raise UserError(f"the text has {LEAST_WORDS} words to train on and to test on of no class; raise --tokens")
    return enough


def concepts(
    acts_ND: Tensor, members: Mapping[str, tuple[Tensor, Tensor]], train_N: Tensor, decay: float
) -> list[Concept]:
    """The classes that a probe on the activations finds among words it was not trained on."""
    x_ND = (acts_ND - acts_ND.mean(0)) / acts_ND.std(0).mean()
    is_NC, counts_NC = (torch.stack(part, dim=1) for part in zip(*members.values(), strict=True))
    weight_CD, bias_C = fit_probes(x_ND[train_N], is_NC[train_N], counts_NC[train_N], decay)
    found_NC = x_ND @ weight_CD.T + bias_C > 0
    made = []
    for (name, (is_N, counts_N)), found_N, probe_D in zip(members.items(), found_NC.T, weight_CD, strict=True):
        test_N = counts_N & ~train_N
        made.append(Concept(name, is_N, counts_N, found_N, probe_D, f1_score(is_N[test_N], found_N[test_N])))
    return [one for one in made if one.f1 > LEAST_F1]


def _enough(words: Sequence[str], is_N: Tensor, train_N: Tensor) -> bool:
    """Has a class enough different words, to train on and to test on?"""
    kinds = [
        {words[place] for place in part_N.nonzero()[:, 0].tolist()} for part_N in (is_N & train_N, is_N & ~train_N)
    ]
    return min(map(len, kinds)) >= LEAST_WORDS


def detectors(codes_NF: Tensor, concept: Concept, train_N: Tensor) -> tuple[Tensor, list[float]]:
    """The latents whose mean code is larger in the class by most, and F1 on the test words of logistic regression on
    the first 1, 2, ... of them, until one adds too little."""
    from sklearn.linear_model import LogisticRegression

    in_N, out_N = concept.counts_N & train_N, concept.counts_N & ~train_N
    difference_F = codes_NF[in_N & concept.is_N].mean(0) - codes_NF[in_N & ~concept.is_N].mean(0)
    order_M, f1 = difference_F.topk(min(MOST_MAIN, len(difference_F))).indices, []
    scale = (codes_NF.sum() / (codes_NF > 0).sum()).nan_to_num(1.0)
    for count in range(1, len(order_M) + 1):
        chosen_NM = codes_NF[:, order_M[:count]] / scale
        regression = LogisticRegression(max_iter=500, class_weight="balanced")
        regression.fit(chosen_NM[in_N].numpy(), concept.is_N[in_N].numpy())
        answers_N = torch.from_numpy(regression.predict(chosen_NM[out_N].numpy()))
        f1.append(f1_score(concept.is_N[out_N], answers_N))
        if main_latents(f1) < count:
            break
    return order_M, f1


@torch.no_grad()
def measure(sae: SAE, acts_ND: Tensor, known: Sequence[Concept], train_N: Tensor) -> Row:
    """Means over the classes of an SAE's measures, and what each class has absorbed in full."""
    device, dec_FD, each = sae.dec_FD.device, sae.dec_FD.cpu(), {}
    codes_NF = torch.cat([sae.encode(part_ND.to(device)).cpu() for part_ND in acts_ND.split(4096)])
    codes_NF *= dec_FD.norm(dim=1)  # not 1 where a topk was saved with other rows
    for concept in known:
        order_M, f1 = detectors(codes_NF, concept, train_N)
        count = main_latents(f1)
        told_N = concept.counts_N & concept.is_N & concept.found_N & ~train_N
        found = absorbed(acts_ND[told_N], codes_NF[told_N], dec_FD, concept.probe_D, order_M[:count])
        shares = (part_N.float().mean().item() for part_N in found)
        each[concept.name] = (*shares, count, f1[0], f1[count - 1])
    means = {name: mean(values) for name, values in zip(MEASURES, zip(*each.values(), strict=True), strict=True)}
    of_class = {concept: round(values[0], 4) for concept, values in each.items()}
    return {"L0": (codes_NF > 0).sum(1).float().mean().item(), **means, "of every class, in full": of_class}


def of_a_kind(rows: Sequence[Row]) -> dict[tuple[str, str, int], list[Row]]:
    """Name, sparsity and layer -> the SAEs that differ by seed alone."""
    found: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["SAEs"], row["sparsity"], row["layer"]), []).append(row)
    return found


def summary(rows: Sequence[Row]) -> list[Row]:
    """A row for every kind of SAEs: mean, and standard deviation where there are several."""
    return [
        {"SAEs": name, "sparsity": sparsity, "layer": layer, "seeds": len(of)}
        | {measure: spread([row[measure] for row in of]) for measure in ("L0", *MEASURES)}
        for (name, sparsity, layer), of in of_a_kind(rows).items()
    ]


def ratios(rows: Sequence[Row]) -> dict[str, float]:
    """What the first SAEs absorb in full over what each other kind does on the same layer at the same sparsity."""
    shares = {kind: mean(row["absorbed in full"] for row in of) for kind, of in of_a_kind(rows).items()}
    first, found = rows[0]["SAEs"], {}
    for (other, sparsity, layer), theirs in sorted(shares.items()):
        ours = shares.get((first, sparsity, layer))
        if other != first and ours is not None and theirs > 0:
            found[f"{first} / {other}, layer {layer}, {sparsity}"] = ours / theirs
    return found


def paired(rows: Sequence[Row]) -> list[Row]:
    """Of each other kind of SAEs, how far the first ones are from it: mean difference of every measure over the
    trainings that both have at the same sparsity, layer and seed, ± its standard error."""
    of: dict[str, dict[tuple[str, int, int | None], Row]] = {}
    for row in rows:
        of.setdefault(row["SAEs"], {})[row["sparsity"], row["layer"], row["seed"]] = row
    first, found = rows[0]["SAEs"], []
    for other in of.keys() - {first}:
        both = [(of[first][which], row) for which, row in of[other].items() if which in of[first]]
        if len(both) > 1:
            apart = {name: mean_and_error([ours[name] - theirs[name] for ours, theirs in both]) for name in MEASURES}
            cells = {name: f"{difference:+.3f} ± {error:.3f}" for name, (difference, error) in apart.items()}
            found.append({"difference": f"{first} - {other}", "trainings": len(both), **cells})
    return sorted(found, key=lambda row: row["difference"])


def tables(rows: Sequence[Row]) -> list[Row]:
    """Three tables: SAEs that differ by seed alone, differences of kinds, every SAE."""
    return [*summary(rows), *paired(rows), *({"one of": row["SAEs"], **row} for row in rows)]


def text_of(saved: Sequence[Saved], source: str | None) -> Text:
    """The text of the runs that the SAEs are from, or one of this source, of which nothing is left out."""
    if source is not None:
        return Text(source=source, tokens=1, held_out_tokens=2, packed=False)
    texts = [one.run.get("workload", {}).get("text") for one in saved]
    if None in texts or any(text != texts[0] for text in texts):
        raise UserError("the SAEs are not all of runs on one text; give a text by --text")
    return from_dict(Text, texts[0], "text.")


def main() -> None:
    """Measure every SAE given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saes", nargs="+", type=Path, metavar="RUN", help="run folders, or SAEs in SAELens' format")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result here")
    parser.add_argument("--text", metavar="SOURCE", help="text to take words from; by default what the runs read")
    parser.add_argument("--tokens", type=int, default=300_000, help="tokens of it, %(default)s")
    parser.add_argument("--each", type=int, default=6, help="times that a word is taken at most, %(default)s")
    parser.add_argument("--decay", type=float, default=1e-3, help="weight decay of the probes, %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the words' split, %(default)s")
    parser.add_argument("--model", help="language model, where the SAEs name another or none")
    parser.add_argument("--dtype", choices=DTYPES, help="its format, where it is to differ from what the SAEs say")
    parser.add_argument("--context", type=int, help="tokens of a row, where they are to differ from what the SAEs say")
    given = parser.parse_args()
    for name in ("tokens", "each", "decay"):
        require(getattr(given, name) > 0, f"--{name}", getattr(given, name), "a positive number")
    ready(given.json)
    saved = find_saved(given.saes)
    text, subjects = text_of(saved, given.text), {one.name: load_subject(one.folder, one.layer) for one in saved}
    lm = load_model(saved, model=given.model, dtype=given.dtype, context=given.context)
    for name, subject in subjects.items():
        check_fits(name, subject, lm, ks=(1,))
    found = read_words(lm, text, given.tokens, given.each)
    kinds = sorted(set(found.words))
    generator = generator_for(given.seed, "words")
    trained = {kinds[place] for place in torch.randperm(len(kinds), generator=generator)[: int(0.8 * len(kinds))]}
    train_N = torch.tensor([word in trained for word in found.words])
    names = told_apart([str(one.run.get("run", one.name)) for one in saved], [one.described["config"] for one in saved])
    members, known = memberships(found.words, train_N), {}
    for layer in sorted({one.layer for one in saved}):
        acts_ND = found.acts_NLD[:, lm.layers.index(layer)]
        known[layer] = concepts(acts_ND, members, train_N, given.decay)
        if not known[layer]:
            raise UserError(
                f"no class of words has a probe of F1 above {LEAST_F1} on layer {layer}: nothing to measure"
            )
    settings = {
        "words": len(kinds),
        "tokens of them": len(found.words),
        "each at most": given.each,
        "decay": given.decay,
    }
    settings |= {
        f"probe F1, layer {layer}": ", ".join(f"{one.name} {one.f1:.2f}" for one in of) for layer, of in known.items()
    }
    rows: list[Row] = []
    for one, name in zip(saved, names, strict=True):
        acts_ND = found.acts_NLD[:, lm.layers.index(one.layer)]
        row = measure(subjects[one.name].sae.to(lm.device), acts_ND, known[one.layer], train_N)
        about = {"SAEs": name, "sparsity": sparsity_of(one.described["config"]), "layer": one.layer}
        rows.append({**about, "seed": one.described["seed"], **row})
        sys.stderr.write(f"{rows[-1]}\n")
        publish("absorption", tables(rows), ratios(rows), given.json, settings, so_far=True)
    publish("absorption", tables(rows), ratios(rows), given.json, settings)


if __name__ == "__main__":
    sys.exit(command(main))
