"""What a stopped `fipo probe` has written already: a result under the same key is taken as done, any other refused."""

from pathlib import Path
from typing import Any

from fipo.data.lm import LanguageModel
from fipo.errors import UserError
from fipo.evaluate import Subject
from fipo.files import read_json, sha256_json


def result_key(subject: Subject, lm: LanguageModel, asked: list[Any]) -> str:
    """Names all that a result depends on; `asked`: texts and settings, as plain values."""
    model = [lm.model_hash, lm.tokenizer_hash, str(lm.dtype), lm.context]
    return sha256_json([subject.layer, subject.key, model, asked])


def read_done(file: Path, key: str) -> dict[str, Any] | None:
    """The result that is there already; one of other settings is a `UserError`."""
    if not file.exists():
        return None
    record = read_json(file)
    if not isinstance(record, dict) or record.get("key") != key:
        raise UserError(f"{file} is the result of another SAE or of other settings; name another --out, or remove it")
    return record
