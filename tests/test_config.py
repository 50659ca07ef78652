"""fipo.config and fipo.records: strict reading, round trip, frozen records, documented fields that somebody reads."""

import ast
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import toys

import fipo.config
from fipo.config import Importance, Levels, RunConfig, Workload
from fipo.errors import UserError
from fipo.records import from_dict, to_dict

PACKAGE = Path(fipo.config.__file__).parent
RECORDS = [value for value in vars(fipo.config).values() if dataclasses.is_dataclass(value)]


def changed(key: str, value: Any) -> dict[str, Any]:
    """A valid config in which every section is on, as plain values, with one key changed."""
    values = to_dict(toys.run_config("run_6"))
    section, *path = values, *key.split(".")
    for part in path[:-1]:
        section = section[part]
    section[path[-1]] = value
    return values


@pytest.mark.parametrize("name", ["run_0", "run_3", "run_6"])
def test_round_trip_through_json(name):
    config = toys.run_config(name)
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_plain_values_hold_no_tuple():
    assert to_dict(toys.run_config("run_6"))["levels"]["shares"] == [0.25, 0.5, 1.0]


def test_defaults_fill_what_is_missing_and_integers_pass_as_floats():
    importance = from_dict(Importance, {"decay": 0})
    assert importance == Importance(decay=0.0) and isinstance(importance.decay, float)


@pytest.mark.parametrize("key", ["sed", "workload.laters", "workload.text.colour", "levels.share", "lsh.bit"])
def test_unknown_key_is_named(key):
    with pytest.raises(UserError, match=re.escape(f"{key} is 1; expected one of the keys")):
        from_dict(RunConfig, changed(key, 1))


@pytest.mark.parametrize("key", ["workload.model", "workload.text.tokens", "run"])
def test_missing_key_is_named(key):
    values = changed(key, None)
    section = values
    for part in key.split(".")[:-1]:
        section = section[part]
    del section[key.split(".")[-1]]
    with pytest.raises(UserError, match=re.escape(f"{key} is None; expected a value: it has no default")):
        from_dict(RunConfig, values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", True),
        ("seed", 1.0),
        ("seed", "42"),
        ("seed", None),
        ("run", 6),
        ("run", None),
        ("architecture", "gelu"),
        ("architecture", 3),
        ("architecture", ["relu"]),
        ("aux_weight", True),
        ("aux_weight", "0.1"),
        ("aux_weight", math.nan),
        ("aux_weight", math.inf),
        pytest.param("aux_weight", 10**400, id="aux_weight-huge"),
        ("workload", None),
        ("workload", [1]),
        ("workload.layers", 3),
        ("workload.layers", "3"),
        ("workload.layers", [1.5]),
        ("workload.layers", [True]),
        ("workload.learning_rate", math.nan),
        ("workload.dtype", "float64"),
        ("workload.weights_sha256", 7),
        ("workload.text", "pile"),
        ("workload.text.packed", 1),
        ("workload.text.packed", "yes"),
        ("workload.probing.ks", [1, "2"]),
        ("workload.probing.datasets", "ag_news"),
        ("importance", 0.99),
        ("importance.decay", math.nan),
        ("importance.norm", "l3"),
        ("penalty.estimator", "mean"),
        ("penalty.yields", "neither"),
        ("penalty.kind", "gram"),
        ("frozen_decoder", 1),
        ("levels.order", "random"),
        ("levels.shares", [0.5, math.nan]),
        ("lsh.autocast", 0),
        ("lsh.bits", 5.5),
    ],
)
def test_wrong_type_is_named(key, value):
    with pytest.raises(UserError, match=re.escape(key)):
        from_dict(RunConfig, changed(key, value))


@pytest.mark.parametrize(
    ("value", "wanted"),
    [("3e-4", "write 3.0e-4"), ("1E5", "write 1.0e5"), ("2.5e3", "write 2.5e3"), ("fast", None), ([1], None)],
)
def test_a_number_that_yaml_takes_for_text(value, wanted):
    with pytest.raises(UserError) as told:
        from_dict(RunConfig, changed("workload.learning_rate", value))
    assert "learning_rate is" in str(told.value) and "expected a finite number" in str(told.value)
    assert (wanted in str(told.value)) if wanted else ("YAML" not in str(told.value))


@pytest.mark.parametrize("key", ["workload.text", "penalty"])
def test_a_section_is_named_without_a_dot(key):
    with pytest.raises(UserError, match=re.escape(f"config: {key} is 3; expected a mapping")):
        from_dict(RunConfig, changed(key, 3))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("aux_weight", -0.1),
        ("log_every", 0),
        ("checkpoint_every", 0),
        ("checkpoint_share", 0.0),
        ("workload.layers", []),
        ("workload.layers", [-1]),
        ("workload.layers", [2, 2]),
        ("workload.context", 2),
        ("text.held_out_tokens", 1),
        ("probing.ks", [1, 2, 1]),
        ("lsh.bits", 24),
        ("optimiser.k_start", 1e308),
        ("workload.latents", 0),
        ("workload.k", 0),
        ("workload.k", toys.LATENTS + 1),
        ("workload.sparsity_penalty", -1.0),
        ("workload.learning_rate", 0.0),
        ("workload.batch_tokens", 0),
        ("workload.dead_tokens", 0),
        ("workload.train_tokens", toys.BATCH - 1),
        ("text.source", ""),
        ("text.tokens", 0),
        ("text.held_out_tokens", 0),
        ("text.buffer_tokens", 0),
        ("text.buffer_tokens", toys.BATCH - 1),
        ("probing.datasets", []),
        ("probing.ks", []),
        ("probing.ks", [0, 1]),
        ("probing.ks", [1, toys.LATENTS + 1]),
        ("probing.train_per_class", 1),
        ("probing.test_per_class", 1),
        ("importance.decay", 1.0),
        ("importance.decay", -0.1),
        ("reservoir.slots", 0),
        ("reservoir.half_life_steps", 0.0),
        ("reservoir.revive_every", 0),
        ("reservoir.encoder_scale", 0.0),
        ("lsh.tables", 0),
        ("lsh.bits", -1),
        ("lsh.bits", 25),
        ("lsh.capacity", 1),
        ("lsh.min_cosine", -0.1),
        ("lsh.min_cosine", 1.0),
        ("lsh.partners", 0),
        ("lsh.refresh_every", 0),
        ("penalty.weight", -1.0),
        ("penalty.margin", -0.1),
        ("penalty.margin", 1.0),
        ("penalty.chunk", 1),
        ("levels.shares", []),
        ("levels.shares", [0.5]),
        ("levels.shares", [0.5, 0.5, 1.0]),
        ("levels.shares", [0.0, 1.0]),
        ("levels.short_power", 0.0),
        ("levels.short_power", 1.1),
        ("levels.favour", [0.1, 0.1]),
        ("levels.favour", [0.0, 0.0, -1.1]),
        ("levels.held", [0.8, 0.6]),
        ("levels.held", [0.6]),
        ("levels.held", [0.6, 1.1]),
        ("levels.stop_gradient", 1.1),
        ("levels.stop_gradient", -0.1),
        ("levels.short", [0.5, 0.4]),
        ("levels.short", [-0.1, 0.4]),
        ("levels.short", [0.4]),
        ("levels.robust", 2.1),
        ("levels.robust", -0.1),
        ("levels.plain", 1.1),
        ("levels.plain", -0.1),
        ("levels.decoder_only", 1.0),
        ("levels.decoder_only", -0.1),
        ("levels.settling_rate", -0.1),
        ("levels.settling_rate", 1.1),
        ("levels.shrink", 1.0),
        ("levels.shrink", -0.1),
        ("optimiser.warmup", 1.1),
        ("optimiser.warmup", -0.1),
        ("optimiser.penalty_warmup", 1.1),
        ("optimiser.penalty_warmup", -0.1),
        ("optimiser.decay", 1.1),
        ("optimiser.decay", -0.1),
        ("optimiser.betas", [0.9]),
        ("optimiser.betas", [0.9, 1.0]),
        ("optimiser.clip", 0.0),
    ],
)
def test_impossible_value_is_named(key, value):
    path = f"workload.{key}" if key.split(".")[0] in ("text", "probing") else key
    with pytest.raises(UserError, match=re.escape(key)):
        from_dict(RunConfig, changed(path, value))


NO_IMPORTANCE = {"lsh": None, "penalty": None, "importance": None}


@pytest.mark.parametrize(
    ("off", "on"),
    [
        ({"importance": None}, "lsh"),
        ({"lsh": None}, "penalty"),
        (NO_IMPORTANCE, "levels"),
        (NO_IMPORTANCE | {"levels": Levels(order="fixed")}, "levels"),
        (NO_IMPORTANCE | {"levels": Levels(favour=(0.0, 0.0, 0.0))}, "levels"),
    ],
)
def test_a_part_that_needs_another_says_so(off, on):
    config = toys.run_config("run_6")
    with pytest.raises(UserError, match=f"{on} is '"):
        dataclasses.replace(config, **off)


def test_ortsae_needs_no_lsh_and_omega_does():
    config = toys.run_config("topk", penalty=fipo.config.Penalty(kind="ortsae"))
    assert config.lsh is None
    with pytest.raises(UserError, match="penalty is 'on'; expected lsh as well"):
        dataclasses.replace(config, penalty=fipo.config.Penalty())


@pytest.mark.parametrize(
    "part",
    [
        {"reservoir": fipo.config.Reservoir()},
        {"penalty": fipo.config.Penalty(kind="ortsae")},
        {"levels": fipo.config.Levels(order="fixed", favour=(0.0, 0.0, 0.0), decoder_only=0.1)},
    ],
)
def test_nothing_may_move_a_frozen_decoder(part):
    assert toys.run_config(
        "topk", frozen_decoder=True, levels=fipo.config.Levels(order="fixed", favour=(0.0, 0.0, 0.0), decoder_only=0.0)
    )
    with pytest.raises(UserError, match="frozen_decoder is True; expected no reservoir"):
        toys.run_config("topk", frozen_decoder=True, **part)


def test_unbiased_needs_all_candidates():
    config = toys.run_config("run_6")
    unbiased = dataclasses.replace(config.penalty, estimator="unbiased")
    with pytest.raises(UserError, match="lsh.partners is 2; expected null"):
        dataclasses.replace(config, penalty=unbiased, lsh=dataclasses.replace(config.lsh, partners=2))
    lsh = dataclasses.replace(config.lsh, partners=None, min_cosine=0.2)
    with pytest.raises(UserError, match="lsh.min_cosine is 0.2; expected at most penalty.margin"):
        dataclasses.replace(config, penalty=unbiased, lsh=lsh)
    every = dataclasses.replace(config, penalty=dataclasses.replace(unbiased, margin=0.2), lsh=lsh)
    assert every.penalty.estimator == "unbiased"


def test_error_names_the_given_value():
    with pytest.raises(UserError, match="importance.decay is 1.5; expected a decay from 0 to below 1"):
        Importance(decay=1.5)


def test_records_are_frozen():
    for part in (config := toys.run_config("run_6"), config.workload, config.workload.text, config.levels):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, "other")


def test_records_take_keywords_only_and_no_new_attribute():
    with pytest.raises(TypeError):
        Importance(0.9)
    assert all("__slots__" in vars(record) for record in RECORDS)


def test_steps_are_whole_batches():
    workload: Workload = toys.workload(train_tokens=3 * toys.BATCH + 5)
    assert workload.steps == 3


RECORD_MODULES = ("config.py", "method.py")


def documented_fields(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Names of all annotated fields, and of those followed by a docstring."""
    fields, documented = set(), set()
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for node, following in zip(cls.body, [*cls.body[1:], ast.Pass()], strict=True):
            if isinstance(node, ast.AnnAssign):
                name = f"{cls.name}.{node.target.id}"
                fields.add(name)
                is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                if is_text and isinstance(following.value.value, str):
                    documented.add(name)
    return fields, documented


def test_every_field_has_a_docstring():
    sources = [(PACKAGE / name).read_text() for name in RECORD_MODULES]
    fields, documented = documented_fields(ast.parse("\n".join(sources)))
    assert len(fields) == sum(len(dataclasses.fields(record)) for record in RECORDS)
    assert fields == documented


def test_every_field_is_read_outside_config():
    """Or by a derived value of a record; a check of its range is no use of a field."""
    read = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        derived = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name != "__post_init__"]
        for part in derived if path.name in RECORD_MODULES else [tree]:
            nodes = ast.walk(part)
            read |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    dead = [f"{r.__name__}.{f.name}" for r in RECORDS for f in dataclasses.fields(r) if f.name not in read]
    assert not dead
