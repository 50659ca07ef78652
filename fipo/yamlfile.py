"""YAML, for configs: plain values in, plain values out.

Refused: tags, which could build objects; aliases, with which a page of text names more values than fit into memory; a
key given twice; half a character; and files far larger than any config.
"""

from pathlib import Path
from typing import Any

import yaml

from fipo.errors import UserError
from fipo.files import check_characters, write_text

LARGEST = 2**18
"""Bytes."""


class _Plain(yaml.SafeLoader):
    """Reads what the module says, and no more."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag or event.anchor:
            raise yaml.YAMLError(
                f"line {event.start_mark.line + 1} has a tag, an anchor or an alias, which are not read"
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it is larger than {LARGEST >> 10} kB")
        values = _Plain(path.read_text(encoding="utf-8")).get_single_data()
        check_characters(values)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check its name") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path} is not readable YAML: {error}; correct it") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}; expected a mapping of keys to values")
    return values


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a mapping, its keys in their order."""
    write_text(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
