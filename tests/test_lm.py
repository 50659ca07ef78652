"""fipo.data.lm: activations against transformers' own hidden states, rows of token ids, and everything that can be
wrong with a model folder or the hub."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch

from fipo.checkpoint import load_tensors, save_tensors
from fipo.data.harvest import _pad
from fipo.data.lm import LanguageModel, find_blocks, resolve_model
from fipo.errors import UserError
from fipo.files import sha256_file

TEXTS = tiny.sentences(6, seed=7)


def load(model, layers=(0, 1), **changes):
    given = {"dtype": "float32", "context": 16, "weights_sha256": None, "device": "cpu"} | changes
    return LanguageModel(str(model), layers, **given)


@pytest.fixture(params=tiny.ARCHITECTURES)
def architecture(request):
    return request.param


def test_activations_are_the_hidden_states_of_a_full_pass(load_lm, architecture):
    lm = load_lm(architecture, layers=(1, 0))
    ids_BS, mask_BS = _pad(list(lm.token_rows(TEXTS)), lm.pad_id)
    acts_LBSD = lm.activations(ids_BS, mask_BS)
    with torch.no_grad():
        full = lm.model(input_ids=ids_BS, attention_mask=mask_BS, output_hidden_states=True).hidden_states
    assert acts_LBSD.shape == (2, *ids_BS.shape, tiny.WIDTH) and acts_LBSD.dtype == torch.float32
    for place, layer in enumerate((1, 0)):
        torch.testing.assert_close(acts_LBSD[place][mask_BS], full[layer + 1][mask_BS], rtol=0, atol=1e-5)
    assert not torch.allclose(acts_LBSD[0], acts_LBSD[1], atol=0.1)


def test_last_layer_is_the_residual_stream_before_the_final_norm(load_lm, architecture):
    lm = load_lm(architecture, layers=(2,))
    ids_BS, mask_BS = _pad(list(lm.token_rows(TEXTS)), lm.pad_id)
    seen = []
    handle = lm.blocks[2].register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        lm.model(input_ids=ids_BS, attention_mask=mask_BS)
    handle.remove()
    expected_BSD = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    torch.testing.assert_close(lm.activations(ids_BS, mask_BS)[0][mask_BS], expected_BSD[mask_BS], rtol=0, atol=1e-5)


def test_blocks_behind_the_last_wanted_layer_never_run_and_no_hook_stays(load_lm, architecture):
    lm = load_lm(architecture, layers=(0, 1))
    calls = []
    handles = [
        block.register_forward_pre_hook(lambda _m, _i, number=number: calls.append(number))
        for number, block in enumerate(lm.blocks)
    ]
    ids_BS, mask_BS = _pad(list(lm.token_rows(TEXTS[:2])), lm.pad_id)
    lm.activations(ids_BS, mask_BS)
    assert calls == [0, 1]
    with torch.no_grad():
        lm.model(input_ids=ids_BS, attention_mask=mask_BS)
    assert calls == [0, 1, 0, 1, 2]
    for handle in handles:
        handle.remove()


def test_padding_does_not_change_content(load_lm, architecture):
    lm = load_lm(architecture)
    rows = list(lm.token_rows(TEXTS))
    ids_BS, mask_BS = _pad(rows, lm.pad_id)
    assert not mask_BS.all()
    together_LBSD = lm.activations(ids_BS, mask_BS)
    for number, row in enumerate(rows):
        alone_LBSD = lm.activations(*_pad([row], lm.pad_id))
        torch.testing.assert_close(together_LBSD[:, number, : len(row)], alone_LBSD[:, 0], rtol=0, atol=1e-4)


def test_special_ids(load_lm, architecture):
    expected = {
        "gpt_neox": {"<|endoftext|>"},
        "gemma2": {"<bos>", "<eos>", "<pad>"},
        "llama": {"<bos>", "<eos>"},
        "bert": {"[CLS]", "[SEP]", "[PAD]"},
    }
    lm = load_lm(architecture)
    assert set(lm.tokenizer.convert_ids_to_tokens(lm.special_ids)) == expected[architecture]


def test_rows_begin_as_the_model_expects_and_fit_the_context(load_lm, architecture):
    lm = load_lm(architecture, context=12)
    rows = list(lm.token_rows(["", *TEXTS]))
    first = lm.tokenizer.convert_tokens_to_ids(
        {"gpt_neox": "<|endoftext|>", "bert": "[CLS]"}.get(architecture, "<bos>")
    )
    assert len(rows) == 7 and max(map(len, rows)) == 12
    for text, row in zip(["", *TEXTS], rows, strict=True):
        assert row[0] == first and first not in row[1:]
        content = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        given = [id_ for id_ in row if id_ not in lm.special_ids]
        assert given == content[: len(given)] and (len(given) == len(content) or len(row) == 12)


def test_packed_rows_are_full_and_lose_only_the_tail(load_lm, architecture):
    lm = load_lm(architecture, context=16)
    texts = tiny.sentences(300, seed=8)  # more than one batch of the tokeniser
    rows = list(lm.packed_rows(iter(texts)))
    front = [] if architecture == "bert" else [lm.begin_id]
    end = [] if architecture == "bert" else [lm.tokenizer.eos_token_id]
    stream = [id_ for text in texts for id_ in [*lm.tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
    assert {len(row) for row in rows} == {16}
    assert all(row[: len(front)] == front for row in rows)
    packed = [id_ for row in rows for id_ in row[len(front) :]]
    assert packed == stream[: len(packed)]
    assert len(stream) - len(packed) < 16 - len(front)


def test_packing_a_stream_that_fits_exactly_keeps_all(load_lm):
    lm = load_lm("gpt_neox", context=16)
    texts = [""] * 30  # thirty end tokens: two full rows of 15
    assert list(lm.packed_rows(texts)) == [[0] * 16] * 2


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_pieces_make_up_the_text(load_lm, architecture):
    """Also of tokens that are a part of a character, and from the middle of a text."""
    lm = load_lm(architecture)
    for text in ("the team of bank", "the g\u00f6al \u2603 of \U0001f600 moon", *tiny.sentences(4, seed=3)):
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        for part in (ids, ids[1:], ids[2:5]):
            pieces = lm.pieces(part)
            assert len(pieces) == len(part) and "".join(pieces) == lm.tokenizer.decode(part).rstrip("\ufffd")
    assert lm.pieces([]) == []


def test_pieces_of_a_tokeniser_that_falls_back_to_bytes():
    """Llama's and Gemma's: bytes of a character that is not whole also spoil whole ones beside them."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = [*(f"<0x{byte:02X}>" for byte in range(256)), *map(chr, range(97, 123)), "\u2581"]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    fast = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    ids = tokenizer.encode("a\u2581\u2603b\U0001f9a3\U0001f9a3").ids
    characters = ["a", " ", "", "", "\u2603", "b", "", "", "", "\U0001f9a3", "", "", "", "\U0001f9a3"]
    assert LanguageModel.pieces(fast, ids) == characters
    assert LanguageModel.pieces(fast, ids[:-2]) == characters[:-2], "cut within a character"
    for begin, broken in ((3, 2), (4, 1), (7, 3), (8, 2)):
        rest = ["\ufffd"] * broken + characters[begin + broken :]
        assert LanguageModel.pieces(fast, ids[begin:]) == rest, "begun within a character"
    spoilt = [*ids[:5], *ids[2:4], ids[0], *ids[2:6]]  # whole, then a part of one, a letter, whole
    assert LanguageModel.pieces(fast, spoilt) == ["a", " ", "", "", "\u2603", "", "", "a", "", "", "\u2603", "b"]
    torn = [*ids[:4], *ids[:6]]  # bytes that never become a character
    assert LanguageModel.pieces(fast, torn)[-4:] == ["", "", "\u2603", "b"]


def test_dtype_and_width(load_lm):
    lm = load_lm("llama", dtype="bfloat16")
    assert lm.dtype == torch.bfloat16 and lm.width == tiny.WIDTH
    assert lm.activations(torch.tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool)).dtype == torch.bfloat16


def test_layer_out_of_range(model_folder):
    with pytest.raises(UserError, match=r"layer 3 of .*: it has layers 0 to 2"):
        load(model_folder("llama"), layers=(0, 3))


def test_weights_hash_must_match(model_folder):
    folder = model_folder("bert")
    right = sha256_file(folder / "model.safetensors")
    assert load(folder, weights_sha256=right).weights_hash == right
    with pytest.raises(UserError, match=f"{right}; expected {'0' * 64}"):
        load(folder, weights_sha256="0" * 64)


def test_sharded_weights_have_one_hash_that_depends_on_each(model_folder, tmp_path):
    from transformers import AutoModel

    folder = tmp_path / "sharded"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "model.safetensors").unlink()
    AutoModel.from_pretrained(model_folder("llama")).save_pretrained(folder, max_shard_size="10KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 1
    before = load(folder).weights_hash
    files[-1].write_bytes(files[0].read_bytes())
    from fipo.data.lm import hash_weights

    assert hash_weights(folder) != before


def test_model_hash_names_the_config_as_well(model_folder, tmp_path):
    """The same weights with another rope are another model; in another folder they are the same."""
    folder = tmp_path / "other"
    shutil.copytree(model_folder("gpt_neox"), folder)
    plain = load(model_folder("gpt_neox"))
    assert load(folder).model_hash == plain.model_hash
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.1}))
    assert load(folder).weights_hash == plain.weights_hash and load(folder).model_hash != plain.model_hash


def test_a_text_is_cut_at_its_end_whatever_the_tokeniser_says(model_folder, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(model_folder("bert"), folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"truncation_side": "left"}))
    text = [" ".join(["moon"] * 20 + ["star"] * 20)]
    assert list(load(folder).token_rows(text)) == list(load(model_folder("bert")).token_rows(text))


def test_missing_folder(tmp_path):
    with pytest.raises(UserError, match="no_such does not exist"):
        load(tmp_path / "no_such")


def test_folder_without_safetensors(model_folder, tmp_path):
    folder = tmp_path / "pickled"
    shutil.copytree(model_folder("bert"), folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \*\.safetensors weights"):
        load(folder)


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("how", ["truncated", "missing"])
def test_damaged_model_folder(model_folder, tmp_path, broken, how):
    folder = tmp_path / "broken"
    shutil.copytree(model_folder("bert"), folder)
    content = (folder / broken).read_bytes()
    (folder / broken).unlink()
    if how == "truncated":
        (folder / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="broken"):
        load(folder)


def test_model_type_nobody_knows(model_folder, tmp_path):
    folder = tmp_path / "strange"
    shutil.copytree(model_folder("bert"), folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "bert"', '"model_type": "no_such_type"'))
    with pytest.raises(UserError, match="strange does not load"):
        load(folder)


def test_hub_out_of_reach():
    with pytest.raises(UserError, match="model someone/something cannot be fetched: the hub is out of reach"):
        load("someone/something")


def hub_that_raises(monkeypatch, kind):
    import huggingface_hub

    def refuse(*_args, **_kwargs):
        raise kind("refused", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def test_gated_model(monkeypatch):
    from huggingface_hub.errors import GatedRepoError

    hub_that_raises(monkeypatch, GatedRepoError)
    with pytest.raises(UserError, match="model google/gated is gated: accept its licence .* HF_TOKEN"):
        load("google/gated")


def test_unknown_model(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    hub_that_raises(monkeypatch, RepositoryNotFoundError)
    with pytest.raises(UserError, match="model some/typo is not on the hub"):
        load("some/typo")


def test_a_short_name_of_transformerlens(monkeypatch):
    """SAELens writes them as model_name."""
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    for kind in (LocalEntryNotFoundError, RepositoryNotFoundError):
        hub_that_raises(monkeypatch, kind)
        with pytest.raises(UserError, match=r"give OWNER/NAME \(fipo probe: --model\)"):
            load("pythia-70m-deduped")
        with pytest.raises(UserError) as told:
            load("some/typo")
        assert "OWNER/NAME" not in str(told.value)


def test_name_that_is_no_hub_id():
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        load("a/b/c")


def test_package_that_is_not_installed():
    with pytest.raises(UserError, match="data package no_such_package is not installed"):
        resolve_model("package:no_such_package/model")


@pytest.mark.parametrize("part", ["normalizer", "post_processor", "vocabulary"])
def test_tokenizer_hash_names_whatever_changes_the_ids(model_folder, tmp_path, part):
    """Activations are cached under it."""
    folder = tmp_path / "other"
    shutil.copytree(model_folder("bert"), folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    if part == "vocabulary":
        vocabulary = content["model"]["vocab"]
        vocabulary["the"], vocabulary["and"] = vocabulary["and"], vocabulary["the"]
    else:
        content[part] = None
    (folder / "tokenizer.json").write_text(json.dumps(content))
    plain, other = load(model_folder("bert")), load(folder)
    text = ["The moon and the star"]
    assert list(plain.token_rows(text)) != list(other.token_rows(text))
    assert plain.tokenizer_hash != other.tokenizer_hash
    assert plain.tokenizer_hash == load(model_folder("bert")).tokenizer_hash


def test_blocks_are_the_list_of_the_right_length():
    lists = {name: torch.nn.ModuleList([torch.nn.Linear(2, 2)] * size) for name, size in (("a", 2), ("b", 3), ("c", 3))}
    model = torch.nn.ModuleDict(lists)
    assert find_blocks(model, 3) is lists["b"]


def test_architecture_without_blocks():
    with pytest.raises(UserError, match="Linear has no list of 3 blocks"):
        find_blocks(torch.nn.Linear(2, 2), 3)


@pytest.mark.parametrize("inside", ["../../etc", "a/../..", "/etc", "", ".", "a//b"])
def test_no_path_leads_out_of_a_package(inside):
    with pytest.raises(UserError, match="is not of the form package:NAME/FOLDER inside an installed"):
        resolve_model(f"package:safetensors/{inside}")


def test_a_package_is_a_plain_name():
    """A dotted one would be imported to be found."""
    with pytest.raises(UserError, match="is not of the form package:NAME/FOLDER"):
        resolve_model("package:os.path/folder")


def copy(model_folder, tmp_path, architecture="bert"):
    shutil.copytree(model_folder(architecture), tmp_path / "model")
    return tmp_path / "model"


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_weights_that_lack_a_tensor(model_folder, tmp_path):
    folder = copy(model_folder, tmp_path)
    tensors = load_tensors(folder / "model.safetensors")
    gone = next(name for name in tensors if "layer.1" in name)
    save_tensors(folder / "model.safetensors", {name: value for name, value in tensors.items() if name != gone})
    with pytest.raises(UserError, match=f"lack 1 tensors, {gone} first, which would be random"):
        load(folder)
    pooler = [name for name in tensors if name.startswith("pooler.")]
    assert pooler, "behind all blocks, and absent from many files"
    save_tensors(folder / "model.safetensors", {name: value for name, value in tensors.items() if name not in pooler})
    load(folder)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"vocab_size": 7}),
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"num_attention_heads": 3}),
        ("tokenizer_config.json", None),
    ],
)
def test_folders_that_are_not_what_they_say(model_folder, tmp_path, file, changes):
    folder = copy(model_folder, tmp_path)
    (folder / file).write_text("[]") if changes is None else rewrite(folder / file, **changes)
    with pytest.raises(UserError, match="does not load as a model with tokeniser"):
        load(folder)


def test_folder_without_a_tokeniser(model_folder, tmp_path):
    folder = copy(model_folder, tmp_path)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="no vocabulary|does not load as a model with tokeniser"):
        load(folder)


def test_tokens_that_the_model_does_not_know(load_lm):
    lm = load_lm("bert")
    known = lm.model.get_input_embeddings().num_embeddings
    ids_BS = torch.tensor([[0, 1, known]])
    with pytest.raises(UserError, match=f"gives token {known}, and the model knows {known}"):
        lm.activations(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool))


def test_context_beyond_the_positions(model_folder, tmp_path):
    with pytest.raises(UserError, match="context 65 is more than .* takes at most 64"):
        load(model_folder("bert"), context=65)
    assert load(model_folder("bert"), context=64).positions == 64
    import transformers

    sizes = {"vocab_size": 40, "max_position_embeddings": 66, "hidden_size": 16, "num_hidden_layers": 2}
    config = transformers.RobertaConfig(**sizes, intermediate_size=32, num_attention_heads=2)
    folder = copy(model_folder, tmp_path)
    transformers.RobertaModel(config).save_pretrained(folder)
    with pytest.raises(UserError, match="context 65 is more than .* takes at most 64"):
        load(folder, context=65)
    lm = load(folder, context=64)
    ids_BS = torch.full((1, 64), 5)
    assert lm.activations(ids_BS, torch.ones_like(ids_BS, dtype=torch.bool)).shape == (2, 1, 64, 16)


def test_the_part_that_reads_text_of_a_model_that_reads_more(load_lm, monkeypatch):
    lm = load_lm("llama")
    inner = lm.model.config
    outer = SimpleNamespace(get_text_config=lambda: inner)
    monkeypatch.setattr(lm.model, "config", outer)
    assert lm.width == tiny.WIDTH and lm.positions == 64
