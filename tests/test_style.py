"""The house rules that a program can check, over the sources of the package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fipo

PACKAGE = Path(fipo.__file__).parent
SOURCES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")}
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}
MODULES = [name for name in TREES if not (name.endswith("__init__.py") and not SOURCES[name].strip())]

CORE = [
    *(
        "config",
        "method",
        "records",
        "activations",
        "sae",
        "decoding",
        "levels",
        "favour",
        "sparse",
        "search",
        "threads",
        "adam",
        "objective",
        "reconstruction",
        "importance",
        "priority",
        "reservoir",
        "lsh",
        "revival",
    ),
    *("metrics", "train", "state", "update", "graphs", "schedules", "checkpoint", "files", "errors", "randomness"),
]
TRACKERS = ["reservoir", "lsh", "importance"]
RANDOM = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "multinomial", "normal"),
    *("bernoulli", "poisson", "exponential_", "uniform_", "normal_", "bernoulli_", "random_", "cauchy_", "geometric_"),
    *("log_normal_", "dropout", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"),
    *("orthogonal_", "trunc_normal_"),
}
OPTIONAL = [
    "triton",
    "numba",
    "transformers",
    "datasets",
    "pyarrow",
    "yaml",
    "matplotlib",
    "rich",
    "sklearn",
    "huggingface_hub",
]


def functions(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(tree: ast.AST):
    """(name, node) of every call, by the last part of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield getattr(node.func, "attr", getattr(node.func, "id", "")), node


def imports(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported, `from a import b` as both a and a.b; inside functions too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def fipo_modules(name: str) -> set[str]:
    """Modules of the package that module `name` imports."""
    parts = {imported.split(".")[1] for imported in imports(TREES[f"{name}.py"]) if imported.startswith("fipo.")}
    return {part for part in parts if f"{part}.py" in TREES or part == "data"}


@pytest.mark.parametrize("name", MODULES)
def test_module_has_a_docstring_and_at_most_300_lines(name):
    assert ast.get_docstring(TREES[name]), "say what the module computes"
    assert len(SOURCES[name].splitlines()) <= 300


@pytest.mark.parametrize("name", MODULES)
def test_functions_have_at_most_80_lines(name):
    too_long = {f.name: f.end_lineno - f.lineno + 1 for f in functions(TREES[name]) if f.end_lineno - f.lineno >= 80}
    assert not too_long


def undocumented(owner: ast.Module | ast.ClassDef, prefix: str = ""):
    """Public functions, classes and methods without a docstring."""
    for node in owner.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node, f"{node.name}.")


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_has_a_docstring(name):
    assert not list(undocumented(TREES[name]))


@pytest.mark.parametrize("name", MODULES)
def test_all_chance_takes_a_generator(name):
    loose = [
        f"{called} in line {node.lineno}"
        for called, node in calls(TREES[name])
        if called in RANDOM and "generator" not in {keyword.arg for keyword in node.keywords}
    ]
    assert not loose
    foreign = {"random", "numpy.random", "secrets"} & imports(TREES[name])
    if name == "data/saebench_text.py":  # replays SAEBench's draws: a seeded random.Random, which is a generator too
        foreign = {call for call in re.findall(r"random\.\w+", SOURCES[name])} - {"random.Random"}
    if name == "sae_probes_suite.py":  # replays sae-probes' draws: a seeded numpy.random.RandomState
        foreign = {imported for imported in imports(TREES[name]) if imported.startswith("numpy.random")}
        foreign -= {"numpy.random", "numpy.random.RandomState"}
    assert not foreign
    uses_numpy = [
        n.lineno for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute) and ast.unparse(n) == "np.random"
    ]
    assert not uses_numpy


@pytest.mark.parametrize("name", [name for name in MODULES if name != "randomness.py"])
def test_only_randomness_seeds(name):
    assert not {"manual_seed", "manual_seed_all", "seed_all", "set_seed"} & {called for called, _ in calls(TREES[name])}


@pytest.mark.parametrize("name", MODULES)
def test_no_bare_except_and_nothing_swallowed(name):
    handlers = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.ExceptHandler)]
    assert all(handler.type is not None for handler in handlers)
    blanket = [handler for handler in handlers if ast.unparse(handler.type) in ("Exception", "BaseException")]
    assert all(isinstance(handler.body[-1], ast.Raise) for handler in blanket), "a blanket handler must raise"


@pytest.mark.parametrize("name", MODULES)
def test_no_code_from_data(name):
    """No pickle, no torch.load, no eval or exec: a checkpoint or a config can never run anything."""
    assert not {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"} & imports(TREES[name])
    plain = [node.func.id for _, node in calls(TREES[name]) if isinstance(node.func, ast.Name)]
    assert not {"eval", "exec", "compile", "__import__"} & set(plain)
    dotted = {ast.unparse(node.func) for _, node in calls(TREES[name])}
    assert not {"torch.load", "torch.save", "torch.serialization.load", "numpy.load", "np.load", "yaml.load"} & dotted


@pytest.mark.parametrize("name", CORE)
def test_core_imports_little(name):
    allowed = {"torch", "safetensors", "numpy", "fipo"} | sys.stdlib_module_names
    assert {imported.split(".")[0] for imported in imports(TREES[f"{name}.py"])} <= allowed
    assert fipo_modules(name) - {"native"} <= set(CORE)  # which is left out where Numba is not installed


def test_core_runs_without_the_optional_packages():
    program = (
        "import sys\n"
        f"for name in {OPTIONAL}: sys.modules[name] = None\n"
        "import importlib\n"
        f"for name in {CORE}: importlib.import_module('fipo.' + name)\n"
        "print('imported')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0 and done.stdout == "imported\n", done.stderr


def test_no_tracker_knows_the_sae():
    for tracker in TRACKERS:
        assert fipo_modules(tracker) <= {"reservoir", "sparse", "priority", "search"}, tracker
    for name in ("sparse", "priority"):
        assert not fipo_modules(name) - {"native"}, (
            "codes as pairs and the rule of who yields know neither SAE nor tracker"
        )


def test_the_sae_knows_no_tracker():
    for name in ("sae", "activations", "decoding", "objective", "reconstruction"):
        assert fipo_modules(name) <= {"activations", "search", "decoding", "sparse", "priority"}, name


def test_the_layers_point_down_and_only_step_and_state_know_all():
    for name in CORE:
        if name not in ("train", "state"):
            assert not {"train", "state"} & fipo_modules(name), name
            assert not (set(TRACKERS) & fipo_modules(name)) or name in TRACKERS, name
    assert fipo_modules("checkpoint") <= {"files", "errors"} and not fipo_modules("errors")
    assert set(TRACKERS) <= fipo_modules("train") | fipo_modules("state")


def test_imports_have_no_cycle():
    graph = {name.removesuffix(".py"): set() for name in TREES if "/" not in name}
    graph = {name: fipo_modules(name) - {name} for name in graph}
    while ends := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in ends:
            del graph[name]
    assert not graph
