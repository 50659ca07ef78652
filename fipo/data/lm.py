"""The language model: any Hugging Face decoder or encoder, read through hooks on its blocks.

One forward pass serves every wanted layer and stops behind the last of them. Weights are read from safetensors only,
no remote code is run. This is the only module that imports transformers and huggingface_hub. Shapes: B texts, S
positions, D model width, L layers.
"""

import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fipo.data.trial import check_reading
from fipo.errors import UserError
from fipo.files import sha256_file, sha256_json

BROKEN, LONGEST_CHARACTER = "\ufffd", 4
"""What stands for a character that is not whole, and the most bytes, hence tokens, that make one."""
WEIGHTS_AND_TOKENISER = ["*.safetensors", "*.json", "tokenizer*", "*.model", "vocab*", "merges*"]


class _LastLayerReached(Exception):
    """Thrown by the last hook: nothing behind it is needed."""


def resolve_model(model: str) -> Path:
    """The local folder of a model: `package:NAME/FOLDER` inside an installed package, a folder, or a hub id."""
    if model.startswith("package:"):
        package, _, inside = model.removeprefix("package:").partition("/")
        if not package.isidentifier() or {"", "..", "."} & set(inside.split("/")):
            raise UserError(f"model {model!r} is not of the form package:NAME/FOLDER inside an installed data package")
        return package_folder(package) / inside
    if os.path.isdir(model):
        return Path(model)
    if model.startswith((".", "/", "~")):
        raise UserError(f"model folder {model} does not exist; expected a folder with config.json and safetensors")
    import huggingface_hub
    from huggingface_hub import errors

    short = "" if "/" in model else "; if it is a short name of TransformerLens', give OWNER/NAME (fipo probe: --model)"
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=WEIGHTS_AND_TOKENISER))
    except errors.GatedRepoError as error:
        raise UserError(
            f"model {model} is gated: accept its licence on its hub page and set HF_TOKEN, or give a local folder"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"model {model} is not on the hub (or is private and HF_TOKEN is not set){short}") from error
    except errors.HFValidationError as error:
        raise UserError(f"model {model!r} is neither a folder nor a hub id of the form OWNER/NAME") from error
    except Exception as error:  # requests, httpx and the hub each have their own name for "no network"
        raise UserError(
            f"model {model} cannot be fetched: the hub is out of reach ({type(error).__name__}); "
            f"check the network, or give a local folder{short}"
        ) from error


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the data package {package} is not installed; run `make setup`")
    return Path(spec.submodule_search_locations[0])


def hash_weights(folder: Path) -> str:
    """SHA-256 of the weights: of the file itself where there is one, of the list of hashes where there are several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no *.safetensors weights; other formats can run code and are not read")
    hashes = [sha256_file(file) for file in files]
    return hashes[0] if len(hashes) == 1 else sha256_json(hashes)


def hash_config(config: Any) -> str:
    """SHA-256 of a config less what is not the model's own: where it lay, which version read it, in which format."""
    values = json.loads(config.to_json_string(use_diff=False))
    return sha256_json({key: values[key] for key in values.keys() - {"_name_or_path", "transformers_version", "dtype"}})


def find_blocks(model: nn.Module, count: int) -> nn.ModuleList:
    """The list of transformer blocks: the first `ModuleList` with as many entries as the config has layers."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise UserError(f"{type(model).__name__} has no list of {count} blocks; this architecture is not supported")


class LanguageModel:
    """A frozen model with its tokeniser, and the residual stream behind the wanted layers."""

    def __init__(
        self, model: str, layers: Sequence[int], *, dtype: str, context: int, weights_sha256: str | None, device: str
    ) -> None:
        folder = resolve_model(model)
        self.name, self.layers, self.context, self.device = model, tuple(layers), context, device
        self.weights_hash = hash_weights(folder)
        if weights_sha256 not in (None, self.weights_hash):
            raise UserError(
                f"the weights of {model} have SHA-256 {self.weights_hash}; expected {weights_sha256}; "
                "install the genuine file (`make setup` does for the built-in workload)"
            )
        self.model, self.tokenizer = _load(folder, dtype)
        self.model.eval().requires_grad_(False).to(device)
        self.config.use_cache = False
        self.blocks = find_blocks(getattr(self.model, "language_model", self.model), self.config.num_hidden_layers)
        if max(self.layers) >= len(self.blocks):
            raise UserError(f"layer {max(self.layers)} of {model}: it has layers 0 to {len(self.blocks) - 1}")
        if self.positions is not None and context > self.positions:
            raise UserError(
                f"context {context} is more than {model} has positions for: it takes at most {self.positions}"
            )
        check_reading(self)
        self.model_hash = sha256_json([self.weights_hash, hash_config(self.config)])
        self.tokenizer_hash = sha256_json([self.tokenizer.backend_tokenizer.to_str(), self.special_ids, self.begin_id])

    @property
    def config(self) -> Any:
        """What transformers says of the part that reads text."""
        return self.model.config.get_text_config()

    @property
    def positions(self) -> int | None:
        """Tokens that the model has positions for; None where it does not say. RoBERTa counts from behind padding."""
        most = getattr(self.config, "max_position_embeddings", None)
        if not isinstance(most, int) or most <= 0:
            return None
        paddings = (
            module.padding_idx
            for name, module in self.model.named_modules()
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding)
        )
        return most - sum(padding + 1 for padding in paddings if padding is not None)

    @property
    def width(self) -> int:
        """D, the width of the residual stream."""
        return self.config.hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """The format in which the model runs."""
        return self.model.dtype

    @property
    def special_ids(self) -> list[int]:
        """Token ids that are not content: padding, begin, end, class and separator."""
        names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
        return sorted({value for name in names if (value := getattr(self.tokenizer, name)) is not None})

    @property
    def begin_id(self) -> int | None:
        """The token with which every row of a decoder begins (attention gathers there); None for encoders."""
        if self.tokenizer.cls_token_id is not None or self.config.is_encoder_decoder:
            return None
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def pad_id(self) -> int:
        """The token that fills a batch up; it is masked, so any will do."""
        return self.tokenizer.pad_token_id or 0

    def token_rows(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """One row of at most `context` token ids a text: its beginning, special tokens included."""
        for batch in _batched(texts, 256):
            encoded = self.tokenizer(batch, truncation=True, max_length=self.context)["input_ids"]
            for ids in encoded:
                if self.begin_id is not None and ids[:1] != [self.begin_id]:
                    ids = [self.begin_id, *ids][: self.context]
                yield ids

    def packed_rows(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """Full rows of `context` token ids: texts end to end, an end token between them, a begin token in front."""
        end = self.tokenizer.eos_token_id
        front = [] if self.begin_id is None else [self.begin_id]
        size, waiting = self.context - len(front), []
        for batch in _batched(texts, 256):
            for ids in self.tokenizer(batch, add_special_tokens=False)["input_ids"]:
                waiting += ids if end is None else [*ids, end]
            for start in range(0, len(waiting) - size + 1, size):
                yield front + waiting[start : start + size]
            waiting = waiting[len(waiting) - len(waiting) % size :]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """What each of these tokens adds to the text of all. A character that several make together is the last one's;
        one that is not whole at the end is nobody's, and tokens of one that began before are U+FFFD each."""

        def decode(tokens: Sequence[int]) -> str:
            return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

        def begins_whole(start: int) -> bool:
            return any(BROKEN not in decode(ids[start : start + count]) for count in range(1, LONGEST_CHARACTER + 1))

        start = next((start for start in range(min(LONGEST_CHARACTER, len(ids))) if begins_whole(start)), 0)
        pieces, text = [BROKEN] * start, ""
        for end in range(start + 1, len(ids) + 1):
            longer = decode(ids[start:end])
            whole = longer.rstrip(BROKEN)
            if whole.startswith(text):
                piece, text = whole.removeprefix(text), whole
            elif whole == longer:
                piece, text = decode(ids[end - 1 : end]), whole
            else:  # byte fallback takes back what it had while a character is not whole
                piece = ""
            pieces.append(piece)
        return pieces

    @torch.inference_mode()
    def activations(self, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
        """Residual stream behind every wanted layer, [L, B, S, D], in the model's own dtype."""
        known = self.model.get_input_embeddings().num_embeddings
        if int(ids_BS.max()) >= known:
            raise UserError(
                f"the tokeniser of {self.name} gives token {int(ids_BS.max())}, and the model knows {known}: they do "
                "not belong together"
            )
        found: dict[int, Tensor] = {}
        last = max(self.layers)

        def reader(layer: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output
                if layer == last:
                    raise _LastLayerReached

            return hook

        handles = [self.blocks[layer].register_forward_hook(reader(layer)) for layer in self.layers]
        try:
            self.forward(ids_BS, mask_BS)
        except _LastLayerReached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([found[layer] for layer in self.layers])

    def forward(self, ids_BS: Tensor, mask_BS: Tensor, **given: Any) -> Any:
        """A pass of the model, or of the encoder of one that has a decoder as well."""
        reader = self.model.get_encoder() if self.config.is_encoder_decoder else self.model
        return reader(input_ids=ids_BS.to(self.device), attention_mask=mask_BS.to(self.device).long(), **given)


def _load(folder: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokeniser, both whole and of the kind that is read."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, told = transformers.AutoModel.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers raises many kinds for a folder that is not what it says
        raise UserError(f"{folder} does not load as a model with tokeniser: {error}") from error
    absent = sorted(name for name in told["missing_keys"] if not name.startswith("pooler."))  # behind all blocks
    if absent:
        raise UserError(
            f"the weights in {folder} lack {len(absent)} tensors, {absent[0]} first, which would be random: they "
            "are incomplete, or of another architecture than config.json says"
        )
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError(f"{folder} has no fast tokeniser (tokenizer.json), the only kind that is read")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{folder} has no vocabulary: its tokeniser files are missing")
    tokenizer.truncation_side = "right"
    return model, tokenizer


def _batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    batch: list[str] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
