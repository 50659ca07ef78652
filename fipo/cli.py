"""The command `fipo`: what is done with saved SAEs and finished runs. Training is `experiment.py`'s.

fipo probe RUN_OR_SAE_DIR ... --datasets NAME_OR_FOLDER ...
fipo compare RUN_OR_RESULT ... [--picture OUT.png]
fipo cache [--remove NAME ...]
"""

import argparse
import signal
import sys
from pathlib import Path

from fipo.errors import EXIT_CODE, UserError
from fipo.output import standard_output

SAEBENCH_ONLY = {
    **{"train": "train_per_class", "test": "test_per_class"},
    **{name: name for name in ("repeats", "rng", "pooling")},
}
"""Options of the suite saebench alone, and what they set in `fipo.config.Probing`."""
DEFAULT_KS = {"saebench": "1,2,5,10,20,50", "sae-probes": "1,2,5"}
SEED_BITS = {"saebench": 63, "sae-probes": 32}
"""What torch takes for a seed; what numpy and scikit-learn take, with which sae-probes draws."""


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand, or say in one line why not."""
    parser = argparse.ArgumentParser(prog="fipo", description="Probe saved SAEs and compare finished runs.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_probe(commands.add_parser("probe", help="sparse probing of saved SAEs, in one pass of the model"))
    _add_compare(commands.add_parser("compare", help="finished runs side by side, as Markdown"))
    _add_cache(commands.add_parser("cache", help="what lies in the cache of activations, and removing it"))
    given = parser.parse_args(arguments)
    try:
        with standard_output():
            given.run(given)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_CODE
    except ModuleNotFoundError as error:
        if (error.name or "fipo").partition(".")[0] == "fipo":  # a defect of ours
            raise
        sys.stderr.write(f"error: {error.name} is not installed; `fipo {given.command}` needs fipo-sae[run]\n")
        return EXIT_CODE
    except BrokenPipeError:  # who reads has seen enough
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        kept = "what is pooled is kept: " if given.command == "probe" else ""
        sys.stderr.write(f"stopped; {kept}give the same command to go on\n")
        return 130
    return 0


def _add_probe(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="RUN_OR_SAE_DIR", help="run folders, or SAEs in SAELens' format")
    add("--suite", choices=("saebench", "sae-probes"), default="saebench", help="protocol (default %(default)s)")
    add(
        "--datasets",
        nargs="+",
        default=[],
        metavar="NAME_OR_FOLDER",
        help="labelled text, see README (saebench: at least one)",
    )
    add("--k", help="numbers of latents, by commas (default 1,2,5,10,20,50; sae-probes 1,2,5)")
    add("--train", type=int, help="training texts a class (saebench, default 2000)")
    add("--test", type=int, help="test texts a class (saebench, default 500)")
    add("--repeats", type=int, help="draws of splits and negatives (saebench, default 1)")
    add("--seed", type=int, default=42, help="of texts, splits, negatives and controls (default %(default)s)")
    add("--rng", choices=("fipo", "saebench"), help="saebench replays SAEBench's random numbers (default fipo)")
    add("--pooling", choices=("float32", "bfloat16"), help="bfloat16 is SAEBench's for such models (default float32)")
    add("--out", type=Path, help="folder for one result file per SAE")
    add("--model", help="the language model (default: what the SAE names)")
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="format in which the model runs (default: what the SAE names, else float32)",
    )
    add("--context", type=int, help="tokens a text (default: what the SAE names)")
    parser.set_defaults(run=_probe)


def _probe(given: argparse.Namespace) -> None:
    try:
        ks = tuple(int(k) for k in (given.k or DEFAULT_KS[given.suite]).split(","))
    except ValueError as error:
        raise UserError(f"--k is {given.k!r}; expected whole numbers by commas, as in 1,2,5") from error
    if min(ks) < 1 or len(set(ks)) < len(ks):
        raise UserError(f"--k is {given.k}; expected positive numbers of latents, each once")
    bits = SEED_BITS[given.suite]
    if not 0 <= given.seed < 2**bits:
        raise UserError(f"--seed is {given.seed}; expected zero or more, for {given.suite} of at most {bits} bits")
    own = {name: value for name in (*SAEBENCH_ONLY, "context") if (value := getattr(given, name)) is not None}
    if given.suite == "sae-probes":
        from fipo import suite_job

        if own:
            raise UserError(f"--{next(iter(own))} means nothing to --suite sae-probes, which fixes it; leave it out")
        suite_job.run(given.folders, given.datasets, ks, given.seed, given.out, given.model, given.dtype)
        return
    if not given.datasets:
        raise UserError("--datasets is missing; name datasets or folders, or give --suite sae-probes")
    from fipo import probe_job
    from fipo.config import Probing

    chosen = {"model": given.model, "dtype": given.dtype, "context": own.pop("context", None)}
    try:
        probing = Probing(
            datasets=tuple(given.datasets), ks=ks, **{SAEBENCH_ONLY[name]: value for name, value in own.items()}
        )
        probe_job.run(given.folders, probing, given.seed, given.out, **chosen)
    except UserError as error:
        raise UserError(_by_options(str(error))) from error


def _by_options(message: str) -> str:
    """What is said of keys of the config, of the options that set them here."""
    for name, key in SAEBENCH_ONLY.items():
        message = message.replace(f"probing.{key}", f"--{name}")
    return message.removeprefix("config: ")


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="RUN_OR_RESULT",
        help="run folders, folders of `fipo probe --out`, or (for the picture) results of benchmarks/ground_truth.py",
    )
    picture = "PNG, PDF or SVG of explained variance against F1 and top-1, by the file's name"
    parser.add_argument("--picture", type=Path, metavar="FILE", help=picture)
    parser.set_defaults(run=_compare)


def _compare(given: argparse.Namespace) -> None:
    from fipo import compare, pareto, suite_table

    if given.picture:
        pareto.picture_format(given.picture)
    files = [path for path in given.paths if path.suffix == ".json"]
    folders = [path for path in given.paths if path not in files]
    if files and not given.picture:
        raise UserError(f"{files[0]} is a file; give folders for the table, or --picture OUT.png to draw it")
    points = [point for file in files for point in pareto.ground_truth_points(file)] if given.picture else []
    suite = [folder for folder in folders if suite_table.holds_suite(folder)]
    others = [folder for folder in folders if folder not in suite]
    tables = [suite_table.suite_report(suite)] if suite else []
    if others:
        tables.append(compare.report(others))
        points += compare.pareto_points(others) if given.picture else []
    if given.picture:
        if not points:
            raise UserError("--picture needs run folders or results of benchmarks/ground_truth.py; none was given")
        pareto.draw_pareto(points, given.picture)
    sys.stdout.write("".join(tables))


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--remove",
        nargs="+",
        default=[],
        metavar="NAME",
        help="entries by the names listed, `unreadable` (of other versions, or damaged) or `all`",
    )
    parser.set_defaults(run=_cache)


def _cache(given: argparse.Namespace) -> None:
    from fipo import cache

    cache.run(given.remove)


if __name__ == "__main__":
    sys.exit(main())
