"""Tiny real inputs, made on the spot: language models with random weights and a small tokeniser, text, labels."""

from pathlib import Path
from typing import Any

import torch
import yaml

TOPICS = {
    "sport": ["team", "goal", "match", "coach"],
    "money": ["bank", "market", "price", "trade"],
    "space": ["star", "planet", "orbit", "moon"],
}
GLUE = ["the", "of", "and", "in"]
ARCHITECTURES = ("gpt_neox", "gemma2", "llama", "bert")
LAYERS, WIDTH = 3, 16


def sentences(count: int, seed: int, topic: str | None = None, longest: int = 20) -> list[str]:
    """Distinct sentences of 5 to `longest` words on one topic, or on all in turn."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words: list[str]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    made = []
    for number in range(count):
        words = TOPICS[topic or list(TOPICS)[number % len(TOPICS)]]
        length = 4 + int(torch.randint(longest - 4, (1,), generator=generator))
        body = [draw(words) if place % 2 else draw(GLUE) for place in range(length)]
        made.append(" ".join([*body, f"{seed}x{number}"]))
    return made


def save_tokenizer(folder: Path, architecture: str) -> int:
    """WordPiece with [CLS] and [SEP] for BERT, byte-level BPE else; returns the vocabulary's size."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = sentences(300, seed=100)
    if architecture == "bert":
        named = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        words = sorted({word for sentence in text for word in sentence.split() if word.isalpha()})
        letters = [*sorted(set("".join(text)) - {" "}), *(str(number) for number in range(10, 1000))]
        pieces = [*named.values(), *letters, *(f"##{letter}" for letter in letters), *words]
        vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
        # Not trained: the trainer's choice hangs on the process's hash seed, and all that is probed with it.
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        template, special = "[CLS] $A [SEP]", ("[CLS]", "[SEP]")
    else:
        # As the real ones do: GPT-NeoX has one token for begin and end and adds neither; the others add a begin token.
        plain = architecture == "gpt_neox"
        named = dict.fromkeys(("bos_token", "eos_token"), "<|endoftext|>") if plain else {}
        named = named or {"bos_token": "<bos>", "eos_token": "<eos>"}
        named |= {"pad_token": "<pad>"} if architecture == "gemma2" else {}
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokens = list(dict.fromkeys(named.values()))
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(text, trainer)
        template, special = ("", ()) if plain else ("<bos> $A", ("<bos>",))
    if template:
        pairs = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return tokenizer.get_vocab_size()


def save_model(folder: Path, architecture: str, seed: int = 0) -> Path:
    """A random model of three blocks of width 16 with its tokeniser, in the hub's layout."""
    import transformers

    sizes = {"vocab_size": save_tokenizer(folder, architecture), "max_position_embeddings": 64}
    sizes |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "intermediate_size": 32, "num_attention_heads": 2}
    grouped = {"num_key_value_heads": 1, "head_dim": 8}
    config = {
        "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes),
        "gemma2": lambda: transformers.Gemma2Config(**sizes, **grouped, sliding_window=8),
        "llama": lambda: transformers.LlamaConfig(**sizes, **grouped),
        "bert": lambda: transformers.BertConfig(**sizes),
    }[architecture]()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModel.from_config(config)
        for name, parameter in model.named_parameters():
            mean = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            std = 1.0 if parameter is model.get_input_embeddings().weight else 0.3  # words matter most
            torch.nn.init.normal_(parameter, mean=mean, std=std)
    model.save_pretrained(folder)
    return folder


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> Path:
    """One parquet file; its folder is made."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def write_labelled(folder: Path, train: int = 24, test: int = 12, seed: int = 1000) -> Path:
    """A labelled folder: one class a topic."""
    for split, count, start in (("train", train, seed), ("test", test, seed + 10)):
        texts = {topic: sentences(count, start + place, topic) for place, topic in enumerate(TOPICS)}
        rows = [(text, topic) for topic, owned in texts.items() for text in owned]
        write_parquet(
            folder / f"{split}.parquet", {"text": [row[0] for row in rows], "label": [row[1] for row in rows]}
        )
    return folder


def workload_values(model: Path, text: Path, labelled: list[Path], **changes: Any) -> dict[str, Any]:
    """A workload of 40 steps of 32 tokens for 64 latents, as plain values."""
    packed = changes.pop("packed", False)
    cached = changes.pop("cached", True)
    return {
        "name": "tiny",
        "model": str(model),
        "layers": [0, 1],
        "context": 16,
        "text": {
            "source": str(text),
            "tokens": 1000,
            "held_out_tokens": 200,
            "packed": packed,
            "cached": cached,
            "buffer_tokens": 256,
        },
        "probing": {
            "datasets": [str(folder) for folder in labelled],
            "train_per_class": 20,
            "test_per_class": 10,
            "ks": [1, 5],
            "cached": cached,
        },
        "latents": 64,
        "k": 4,
        "sparsity_penalty": 0.01,
        "learning_rate": 0.003,
        "batch_tokens": 32,
        "train_tokens": 1280,
        "dead_tokens": 320,
    } | changes


def write_workload(path: Path, values: dict[str, Any]) -> Path:
    """A workload as the YAML file that FIPO_WORKLOAD may name."""
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path
