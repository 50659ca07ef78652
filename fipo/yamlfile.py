"""YAML, for configs: plain values in, plain values out; tags, which could build objects, are refused."""

from pathlib import Path
from typing import Any

import yaml

from fipo.errors import UserError
from fipo.files import write_text


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file; plain values only, tags are refused."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not readable YAML: {error}") from error
    if not isinstance(values or {}, dict):
        raise UserError(f"{path} holds {type(values).__name__}; expected a mapping of keys to values")
    return values or {}


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping, its keys in their order."""
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
