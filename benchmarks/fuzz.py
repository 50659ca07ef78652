"""Thousands of damaged and hostile files, of every kind that is ever read: is one accepted that is wrong?

    python benchmarks/fuzz.py --json OUT [--cases N] [--seed N]

A good file is changed at random (bits, bytes, ranges, numbers, lengths, nesting, paths, tags), then read by the
function that reads it in a run. It must be refused in one line (`UserError`), or what was read must be right: equal to
the original where a checksum covers it, else equal to what a second, independent reader finds, and in range. Counted
are exceptions of any other kind, reads of more than 5 s of processor time or 1 GB of memory, crashes, and wrong values.
"""

import argparse
import contextlib
import io
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import datasets  # noqa: E402
import pyarrow.parquet  # noqa: E402, F401
import tiny  # noqa: E402
import torch  # noqa: E402
import toys  # noqa: E402
import yaml  # noqa: E402

from benchmarks.common import command, publish, ready  # noqa: E402
from fipo import checkpoint, compare, report, results, runs, saved, suite_table  # noqa: E402
from fipo.activations import build_activation  # noqa: E402
from fipo.config import Probing, Text  # noqa: E402
from fipo.data import shards, store  # noqa: E402
from fipo.data.harvest import Chunk  # noqa: E402
from fipo.data.labelled import load_labelled  # noqa: E402
from fipo.data.text import open_text  # noqa: E402
from fipo.errors import UserError  # noqa: E402
from fipo.export import load_sae, save_sae  # noqa: E402
from fipo.log import append_log, read_log  # noqa: E402
from fipo.records import to_dict  # noqa: E402
from fipo.sae import SAE  # noqa: E402

SECONDS, MEMORY, PATIENCE = 5, 2**30, 300.0
BATCH = 40
"""Files that one process reads: what it crashes on is known, the others are read by the next."""
NASTY = [
    *(b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b".inf", b"1.5", b"9" * 25, b"9" * 5000, b"[]"),
    *(b"{}", b'""', b'"../../../etc/passwd"', b'"/etc/passwd"', b"'x\\0y'", b'"' + b"x" * 5000 + b'"', b"[[1]]"),
    *(b"[" * 10_000, b'{"a":' * 10_000, b"- " * 10_000, b"&a [*a, *a]", b"*a", b"!!python/object/apply:os.system [id]"),
    *(b"!!binary aGk=", b"<<: {seed: 1}", b"? [1]\n: 2", b"2020-01-01", b"\xff\xfe", b"\x00", b"\xed\xa0\x80", b"\n\n"),
]


class Target:
    """A kind of file: how a good one is made, which function reads it, and how its answer is checked."""

    name = ""
    share = 1.0
    text = True

    def make(self, folder: Path) -> list[Path]:
        """Write good files; returns those to be changed."""
        raise NotImplementedError

    def read(self, folder: Path) -> Any:
        """What a run reads from them."""
        raise NotImplementedError

    def right(self, folder: Path, value: Any) -> bool:
        """Is that what the files say, and possible?"""
        raise NotImplementedError


class Config(Target):
    """`config.yaml` of a run folder."""

    name, share = "config", 5.0

    def make(self, folder: Path) -> list[Path]:
        """A whole one: as resolved."""
        (folder / "run_6").mkdir()
        values = to_dict(toys.run_config("run_6"))
        (folder / "run_6" / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        return [folder / "run_6" / "config.yaml"]

    def read(self, folder: Path) -> Any:
        """The config of the run."""
        return runs.resolve(folder / "run_6", ROOT / "experiments")

    def right(self, folder: Path, value: Any) -> bool:
        """Every value that the file gives is the config's, unbent."""
        try:
            given = yaml.safe_load((folder / "run_6" / "config.yaml").read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, ValueError, RecursionError):
            return False
        if isinstance(given.get("workload"), str):
            given["workload"] = {"name": given["workload"]}
        whole = to_dict(value)
        finite = all(math.isfinite(number) for number in _numbers(whole))
        sizes = value.workload
        possible = min(sizes.latents, sizes.k, sizes.batch_tokens, sizes.context) > 0 and sizes.k <= sizes.latents
        return finite and possible and _within(given, whole)


class Sae(Target):
    """A saved SAE."""

    name, share, text = "SAE", 4.0, False

    def make(self, folder: Path) -> list[Path]:
        """One of each architecture, by chance of the folder's name."""
        kind = ("relu", "topk", "batchtopk", "jumprelu")[sum(folder.name.encode()) % 4]
        sae = SAE(8, 16, build_activation(kind, 16, 3), generator=toys.seeded())
        save_sae(folder, sae, model="m", layer=1, context=16, dataset="d", beside={"sigma_F": torch.ones(16)})
        return [folder / "sae_weights.safetensors", folder / "sae_weights.safetensors", folder / "cfg.json"]

    def read(self, folder: Path) -> Any:
        """The SAE."""
        return load_sae(folder)

    def right(self, folder: Path, value: Any) -> bool:
        """Its weights are the file's, as read by hand and with decoder norms folded, and finite."""
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        found = _read_by_hand(folder / "sae_weights.safetensors")
        norm_F = found["W_dec"].double().norm(dim=1).clamp_min(1e-8)
        if config["architecture"] == "topk" and not config.get("rescale_acts_by_decoder_norm"):
            norm_F = torch.ones(len(norm_F))
        folded = {"W_enc": found["W_enc"] * norm_F, "b_enc": found["b_enc"] * norm_F}
        folded["W_dec"] = found["W_dec"] / norm_F[:, None]
        read = {"W_enc": value.enc_FD.T, "b_enc": value.enc_bias_F, "W_dec": value.dec_FD}
        same = all(torch.allclose(read[name].double(), folded[name].double(), 1e-4, 1e-30) for name in read)
        sizes = (value.d_in, value.latents) == (config["d_in"], config["d_sae"])
        bias_D = value.mean_D + value.dec_bias_D
        finite = all(tensor.isfinite().all() for tensor in value.state_dict().values())
        return same and sizes and finite and torch.equal(found["b_dec"], bias_D.detach())


class Checkpoint(Target):
    """The newest of two checkpoints."""

    name, share, text = "checkpoint", 3.0, False

    def make(self, folder: Path) -> list[Path]:
        """Steps 1 and 2; the second is changed."""
        for step in (1, 2):
            tensors = {"step": torch.tensor(step), "weights": torch.full((40,), float(step))}
            checkpoint.save_checkpoint(folder, step, "key", tensors)
        return [folder / "step_2" / "state.safetensors", folder / "step_2" / "checkpoint.json"]

    def read(self, folder: Path) -> Any:
        """The newest whole one."""
        return checkpoint.load_checkpoint(folder, "key", lambda _line: None)

    def right(self, _folder: Path, value: Any) -> bool:
        """One of the two, to the bit."""
        step = float(value["step"])
        return step in (1, 2) and value.keys() == {"step", "weights"} and bool((value["weights"] == step).all())


class Shards(Target):
    """Stored activations."""

    name, share, text = "shard", 3.0, False

    def make(self, folder: Path) -> list[Path]:
        """Three shards and a manifest."""
        shards.SHARD_TOKENS = 10
        os.environ["FIPO_CACHE"] = str(folder)
        made = store.open_or_harvest({"key": 1}, lambda skip: toys.after(self.chunks(), skip), tokens=None)
        (folder / "name").write_text(made.folder.name, encoding="utf-8")
        return [made.folder / "shard_00001.safetensors", made.folder / "manifest.json"]

    def chunks(self) -> list[Chunk]:
        """Planted activations."""
        return [Chunk(torch.randn(25, 2, 3, generator=toys.seeded()), torch.arange(25), torch.arange(100, 125))]

    def read(self, folder: Path) -> Any:
        """The store."""
        return store.ActivationStore(folder / (folder / "name").read_text(encoding="utf-8"))

    def right(self, _folder: Path, value: Any) -> bool:
        """All activations, to the bit."""
        (chunk,) = self.chunks()
        found = value.read(0, 25), value.texts(), value.token_ids()
        return all(map(torch.equal, found, chunk))


class Result(Target):
    """The record of a finished run."""

    name, share = "result", 4.0

    def make(self, folder: Path) -> list[Path]:
        """A record of two layers."""
        layer = {
            **{"dict_size": 64, "training_steps": 40, "held_out_fvu": 0.3, "held_out_l0": 30.5, "dead_share": 0.1},
            **{"mean_max_cosine": 0.4, **_scored()},
        }
        record = {"run": "run_3", "workload": "tiny", "seed": 1, "git_revision": "abc", "versions": {"torch": "2"}}
        record |= {"hardware": {"cpu": "x"}, "eval_config": layer["eval_config"]}
        record |= {"layers": {str(number): {"layer": number, **layer} for number in (0, 1)}}
        return [_written(folder / results.FINAL, record)]

    def read(self, folder: Path) -> Any:
        """The record."""
        return results.read_result(folder)

    def right(self, folder: Path, value: Any) -> bool:
        """What the file says, with every number finite and every accuracy a share."""
        shares = [
            score
            for record in value["layers"].values()
            for row in [*record["eval_result_details"], *record["eval_result_metrics"].values()]
            for name, score in row.items()
            if name.endswith("accuracy") and score is not None
        ]
        said = json.loads((folder / results.FINAL).read_text(encoding="utf-8"))
        finite = all(math.isfinite(number) for number in _numbers(value))
        return said == value and finite and all(0 <= share <= 1 for share in shares)


class Compared(Result):
    """Record and times of a finished run, made into the tables of `fipo compare`."""

    name, share = "compared", 2.0

    def make(self, folder: Path) -> list[Path]:
        """With controls."""
        (file,) = super().make(folder)
        record = json.loads(file.read_text(encoding="utf-8"))
        for layer in record["layers"].values():
            layer["eval_result_controls"] = _controls()
            layer |= {"k": None, "sparsity_penalty": 0.01, "eval_result_unstructured": {}}
        record["architecture"] = "relu"
        times = {"harvest": 1.5, "training": 2.5, "harvested": True, "hardware": {"cpu": "some"}}
        return [_written(file, record), _written(folder / results.RUNTIME, times)]

    def read(self, folder: Path) -> Any:
        """The tables, and the record that they are of."""
        compare.report([folder])
        record = super().read(folder)
        if all("eval_result_controls" in layer for layer in record["layers"].values()):
            with contextlib.redirect_stdout(io.StringIO()):
                report.print_results(folder)
        return record


class Probed(Target):
    """A result of `fipo probe`, in the table of `fipo compare`."""

    name, share = "probe result", 2.0

    def make(self, folder: Path) -> list[Path]:
        """Of an SAE of a run."""
        record = {
            "sae": {"name": "run_3/layer_1", "layer": 1, "run": "run_3", "seed": 1, "config": {"workload.k": "4"}},
            **{"git_revision": "abc", "versions": {"torch": "2"}, "hardware": {"cpu": "x"}},
            **_scored(),
            "eval_result_controls": _controls(),
        }
        return [_written(folder / f"x{results.RESULT_SUFFIX}", record)]

    def read(self, folder: Path) -> Any:
        """The table."""
        return compare.report([folder])

    def right(self, folder: Path, value: Any) -> bool:
        """It has a row for the one SAE, with accuracies that are shares."""
        rows = [line.split("|") for line in value.splitlines() if line.startswith("| - |")]
        cells = [cell for cell in rows[0][4:-1] if cell.strip() != "-"] if len(rows) == 1 else ["2"]
        return all(0 <= float(cell) <= 1 for cell in cells)


class Suite(Target):
    """A result of the second suite, in its table."""

    name, share = "suite result", 2.0

    def make(self, folder: Path) -> list[Path]:
        """Of two datasets."""
        scores = {"1": {"accuracy": 0.7, "auc": 0.75, "f1": 0.6}, "2": {"accuracy": 0.8, "auc": 0.85, "f1": 0.7}}
        record = {
            "sae": {"name": "x", "layer": 1, "run": None, "seed": None, "config": {}},
            **{"model": "m", "dtype": "float32", "context": 16},
            **{"git_revision": "abc", "hardware": {"cpu": "x"}, "mean": {"sae": scores}},
            "results": {name: dict.fromkeys(("sae", "llm", "random"), scores) for name in "ab"},
        }
        return [_written(folder / f"x{results.SUITE_RESULT_SUFFIX}", record)]

    def read(self, folder: Path) -> Any:
        """The table."""
        return suite_table.suite_report([folder])

    def right(self, folder: Path, value: Any) -> bool:
        """Three rows of shares: the SAE and two controls."""
        rows = [line.split("|")[3:-1] for line in value.splitlines() if line.startswith("|")][2:]
        return len(rows) == 3 and all(0 <= float(cell.split("±")[0]) <= 1 for row in rows for cell in row)


class Metadata(Target):
    """What the cfg.json of an SAE says of the model that it reads."""

    name, share = "SAE's model", 2.0

    def make(self, folder: Path) -> list[Path]:
        """Beside a run's config."""
        metadata = {"model_name": "m", "hook_name": "blocks.1.hook_resid_post", "hook_layer": 1, "context_size": 16}
        (folder / "layer_1").mkdir()
        described = _written(folder / "layer_1" / "cfg.json", {"metadata": metadata})
        (folder / "config.yaml").write_text("run: run_3\nseed: 1\nworkload:\n  dtype: float32\n", encoding="utf-8")
        return [described, described, folder / "config.yaml"]

    def read(self, folder: Path) -> Any:
        """The SAE found."""
        return saved.find_saved([folder / "layer_1"])[0]

    def right(self, folder: Path, value: Any) -> bool:
        """A layer, and of the model what is of its type."""
        metadata = value.config["metadata"]
        context = metadata.get("context_size")
        named = isinstance(metadata.get("model_name"), str | None)
        return value.layer >= 0 and named and (context is None or (type(context) is int and context > 0))


class Log(Target):
    """The training log."""

    name, share = "log", 2.0

    def make(self, folder: Path) -> list[Path]:
        """Eight lines."""
        append_log(folder / "log.jsonl", [{"step": step, "layer": 0, "loss": 1 / step} for step in range(1, 9)])
        return [folder / "log.jsonl"]

    def read(self, folder: Path) -> Any:
        """Its whole lines."""
        return read_log(folder / "log.jsonl")

    def right(self, folder: Path, value: Any) -> bool:
        """The first lines of the file."""
        lines = (folder / "log.jsonl").read_bytes().split(b"\n")
        return all(
            json.loads(line.decode("utf-8", "replace")) == read for line, read in zip(lines, value, strict=False)
        )


class Labelled(Target):
    """A labelled folder."""

    name, share, text = "labelled text", 3.0, False

    def make(self, folder: Path) -> list[Path]:
        """Three classes, by number, with a description."""
        for split in ("train", "test"):
            texts = {"text": [f"{split} {n}" for n in range(30)], "label": [n % 3 for n in range(30)]}
            tiny.write_parquet(folder / "data" / f"{split}.parquet", texts)
        description = folder / "data" / "dataset.json"
        description.write_text(json.dumps({"label_names": ["a", "b", "c"]}), encoding="utf-8")
        return [folder / "data" / "train.parquet", folder / "data" / "test.parquet", description]

    def read(self, folder: Path) -> Any:
        """The dataset."""
        return load_labelled(str(folder / "data"), Probing(datasets=("x",), train_per_class=5, test_per_class=4), 0)

    def right(self, _folder: Path, value: Any) -> bool:
        """Texts, as many a class as asked, and no test text among those of training."""
        train = [text for texts in value.train.values() for text in texts]
        sizes = {len(texts) for texts in value.train.values()} | {len(texts) + 1 for texts in value.test.values()}
        return sizes == {5} and all(isinstance(text, str) and text for text in value.texts) and len(train) >= 10


class Training(Target):
    """Training text."""

    name, share = "training text", 1.5

    def make(self, folder: Path) -> list[Path]:
        """One file of lines."""
        lines = [json.dumps({"text": text}) for text in tiny.sentences(20, seed=1)]
        (folder / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return [folder / "text.jsonl"]

    def read(self, folder: Path) -> Any:
        """All texts."""
        source = Text(source=str(folder / "text.jsonl"), tokens=1, held_out_tokens=2, packed=False)
        return list(open_text(source).texts())

    def right(self, _folder: Path, value: Any) -> bool:
        """They are texts."""
        return all(isinstance(text, str) and text for text in value)


TARGETS = [Config(), Sae(), Metadata(), Checkpoint(), Shards(), Result(), Compared(), Probed(), Suite()]
TARGETS += [Log(), Labelled(), Training()]


def _written(file: Path, record: dict[str, Any]) -> Path:
    """The file, which holds the record."""
    file.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return file


def _scored() -> dict[str, Any]:
    scores, others = (
        {f"{who}_top_{k}_test_accuracy": 0.75 for who in ("llm", "sae") for k in ks} for ks in ((1, 5), (3,))
    )
    return {
        "eval_config": {"dataset_names": ["a", "b"], "k_values": [1, 3, 5], "random_seed": 1},
        "eval_result_protocol": {"rng": "fipo", "pooling": "float32"},
        "eval_result_datasets": [{"dataset_name": name, "selected_texts_sha256": "0" * 64} for name in "ab"],
        "eval_result_other_ks": {"mean": others, "datasets": dict.fromkeys("ab", others)},
        "eval_result_metrics": {who: {n: v for n, v in scores.items() if n.startswith(who)} for who in ("llm", "sae")},
        "eval_result_details": [{"dataset_name": f"{name}_results", **scores} for name in "ab"],
    }


def _controls() -> dict[str, Any]:
    scores = {f"{who}_top_{k}_test_accuracy": 0.6 for who in ("pca", "random") for k in (1, 3, 5)}
    margins = {f"top_{k}": {"difference": 0.1, "standard_error": 0.01} for k in (1, 3, 5)}
    return {"mean": scores, "datasets": dict.fromkeys("ab", scores), "margin_over_random": margins}


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for item in value.values() for number in _numbers(item)]
    if isinstance(value, list):
        return [number for item in value for number in _numbers(item)]
    return [float(value)] if isinstance(value, int | float) else []


def _within(given: Any, whole: Any) -> bool:
    """Is every given value there, of the same type but for integers that stand for floats?"""
    if isinstance(given, dict):
        return isinstance(whole, dict) and all(key in whole and _within(given[key], whole[key]) for key in given)
    if isinstance(given, list):
        return isinstance(whole, list) and len(given) == len(whole) and all(map(_within, given, whole))
    kinds = {type(given), type(whole)}
    return given == whole and (len(kinds) == 1 or kinds == {int, float})


def _read_by_hand(file: Path) -> dict[str, torch.Tensor]:
    """float32 tensors of a safetensors file, by its documentation alone."""
    content = file.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[
            entry["dtype"]
        ]
        tensors[name] = torch.frombuffer(bytearray(data[start:end]), dtype=dtype).float().reshape(entry["shape"])
    return tensors


def damage(content: bytes, chance: random.Random, text: bool) -> bytes:
    """A file changed in one of many ways, or in several."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        content = _damaged_once(content, chance, text) if content else b"\x00"
    return content


def _damaged_once(content: bytes, chance: random.Random, text: bool) -> bytes:
    size = len(content)
    start = chance.randrange(size)
    end = min(size, start + chance.choice((1, 2, 8, 64, 1000)))
    first, last = _value_at(content, start)
    lengths = (0, 1, 2**31, 2**62, 2**63, 2**64 - 1, size, max(0, size - 8), 100_000_001)
    ways: list[Callable[[], bytes]] = [
        lambda: content[:start] + bytes([content[start] ^ (1 << chance.randrange(8))]) + content[start + 1 :],
        lambda: content[:start] + chance.randbytes(end - start) + content[end:],
        lambda: content[:start] + content[end:],
        lambda: content[:start] + content[start:end] * 2 + content[end:],
        lambda: content[:start],
        lambda: content[:start] + chance.choice(NASTY) + content[start:],
        lambda: b"",
    ]
    ways += [lambda: content[:first] + chance.choice(NASTY) + content[last:]] * (8 if text else 3)
    ways += [lambda: struct.pack("<Q", chance.choice(lengths)) + content[8:]] * (0 if text else 2)
    ways += [lambda: _lying_header(content, chance)] * (0 if text else 8)
    return chance.choice(ways)()


def _lying_header(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file whose header says something else and is of the right length; other files stay as they are."""
    try:
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        name = chance.choice([name for name in header if name != "__metadata__"])
        entry = header[name]
        sizes = (0, -1, 1, 7, 10**9, 2**40, 2**63, 2**64, 10**30, 1.5, "8", None, [8])
        match chance.randrange(6):
            case 0:
                entry["dtype"] = chance.choice(
                    ["F64", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "F4", "C64", "X", 3, None]
                )
            case 1:
                entry["shape"][chance.randrange(len(entry["shape"]))] = chance.choice(sizes)
            case 2:
                entry["shape"] = chance.choice([[], [0], [2**32, 2**32], [1] * 5000, 8, "[8]", entry["shape"][::-1]])
            case 3:
                entry["data_offsets"][chance.randrange(2)] = chance.choice(sizes)
            case 4:
                header[chance.choice(["../x", "/etc/passwd", "", "W_dec", "x" * 9999, "__metadata__"])] = header.pop(
                    name
                )
            case 5:
                header[name + "_"] = dict(entry)
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError, struct.error):
        return content[:-1]
    changed = json.dumps(header).encode()
    return struct.pack("<Q", len(changed)) + changed + content[8 + length :]


def _value_at(content: bytes, place: int) -> tuple[int, int]:
    """Bounds of the JSON or YAML value nearest behind a place."""
    ends = b",]}\n"
    start = max(content.find(b":", place), 0) + 1
    end = min((found for mark in ends if (found := content.find(mark, start)) >= 0), default=len(content))
    return start, max(start, end)


def case(target: Target, folder: Path, chance: random.Random) -> tuple[str, str]:
    """Make, change, read, check; (outcome, detail)."""
    changed = chance.choice(target.make(folder))
    if chance.random() < 0.02:
        changed.unlink()
        changed.symlink_to("/etc/passwd")
    else:
        changed.write_bytes(damage(changed.read_bytes(), chance, target.text or changed.suffix == ".json"))
    try:
        value = target.read(folder)
    except UserError as error:
        return (
            ("refused", "") if "\n" not in str(error) and len(str(error)) < 2000 else ("wrong", "message of many lines")
        )
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {str(error)[:300]}"
    if value is None:
        return "refused", ""
    try:
        return ("accepted", "") if target.right(folder, value) else ("wrong", changed.name)
    except Exception as error:  # the second reader cannot read what the first accepted
        return "wrong", f"{changed.name}: {type(error).__name__}: {str(error)[:300]}"


def batch(jobs: list[tuple[int, Target]], root: Path, seed: int, board: mmap.mmap, pipe: int) -> None:
    """Read these files, telling which one is being read and what came of each."""
    for number, target in jobs:
        board[:16] = struct.pack("qd", number, time.monotonic())
        folder = root / f"case_{number}"
        folder.mkdir()
        began = time.process_time()
        resource.setrlimit(resource.RLIMIT_CPU, (int(began) + 1 + SECONDS, resource.RLIM_INFINITY))
        outcome, detail = case(target, folder, random.Random(f"{seed}/{number}"))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if memory > MEMORY:
            outcome, detail = "memory", f"{memory >> 20} MB"
        said = {"case": number, "target": target.name, "outcome": outcome, "detail": detail, "memory": memory}
        said["seconds"] = time.process_time() - began
        os.write(pipe, json.dumps(said).encode() + b"\n")
        if outcome in ("refused", "accepted"):
            shutil.rmtree(folder, ignore_errors=True)


def run_all(jobs: list[tuple[int, Target]], root: Path, seed: int) -> list[dict[str, Any]]:
    """Outcomes of all cases; a process that crashes or hangs costs only the case it was at."""
    found: list[dict[str, Any]] = []
    while jobs:
        board, (reader, writer) = mmap.mmap(-1, 16), os.pipe()
        board[:16] = struct.pack("qd", jobs[0][0], time.monotonic())
        if not (child := os.fork()):
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 2)
            batch(jobs[:BATCH], root, seed, board, writer)
            os._exit(0)
        os.close(writer)
        outcome, ended = "crash", False
        while not ended:
            ended = bool(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT))
            if not ended and time.monotonic() - struct.unpack("qd", board[:16])[1] > PATIENCE:
                outcome, ended = "hang", True
                os.kill(child, signal.SIGKILL)
            time.sleep(0.01)
        status = os.waitpid(child, 0)[1]
        with open(reader, encoding="utf-8") as lines:
            told = [json.loads(line) for line in lines]
        found += told
        done = {one["case"] for one in told}
        at = struct.unpack("qd", board[:16])[0]
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
            outcome = "hang"
        if status and at not in done:
            target = dict(jobs)[at]
            found.append({"case": at, "target": target.name, "outcome": outcome, "detail": f"status {status}"})
            done.add(at)
        jobs = [job for job in jobs if job[0] not in done]
    return found


def main() -> int:
    """Damage, read, count."""
    parser = argparse.ArgumentParser(description="Read thousands of damaged files; is one accepted that is wrong?")
    parser.add_argument("--json", type=Path, required=True, help="where the numbers go")
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.cases < 1:
        raise UserError(f"--cases is {arguments.cases}; expected at least 1")
    ready(arguments.json)
    datasets.disable_progress_bars()
    root = Path(tempfile.mkdtemp(prefix="fipo_fuzz_"))
    chance = random.Random(arguments.seed)
    kinds = chance.choices(TARGETS, [target.share for target in TARGETS], k=arguments.cases)
    found = run_all(list(enumerate(kinds)), root, arguments.seed)
    outcomes = ("refused", "accepted", "traceback", "wrong", "hang", "memory", "crash")
    rows = [
        {"file": target.name}
        | {
            outcome: sum(one["outcome"] == outcome and one["target"] == target.name for one in found)
            for outcome in outcomes
        }
        for target in TARGETS
    ]
    bad = [one for one in found if one["outcome"] not in ("refused", "accepted")]
    ratios: dict[str, float] = {"cases": len(found)} | {key: sum(row[key] for row in rows) for key in outcomes}
    ratios["slowest_seconds"] = round(max(one.get("seconds", SECONDS) for one in found), 2)
    ratios["most_memory_mb"] = max(one.get("memory", 0) for one in found) >> 20
    for one in bad:
        sys.stderr.write(f"{root}/case_{one['case']}: {one['target']}: {one['outcome']}: {one['detail']}\n")
    publish("fuzz", rows, ratios, arguments.json)
    if not bad:
        shutil.rmtree(root)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(command(main))
