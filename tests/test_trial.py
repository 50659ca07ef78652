"""fipo.data.trial: an architecture whose hooks do not read the residual stream is refused when it is loaded."""

import pytest
import tiny
import torch

from fipo.data.lm import LanguageModel
from fipo.errors import UserError

SIZES = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "max_position_embeddings": 64}


def load(folder, name, **config):
    """A random model of the architecture, with a tokeniser, as a user would name it."""
    import transformers

    size = tiny.save_tokenizer(folder, "bert")
    made = getattr(transformers, f"{name}Config")(vocab_size=size, **SIZES | config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModel.from_config(made)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
    model.save_pretrained(folder)
    return LanguageModel(str(folder), (0, 1), dtype="float32", context=16, weights_sha256=None, device="cpu")


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("XLM", {"emb_dim": 16, "n_layers": 3, "n_heads": 2}, "MultiHeadAttention 0 gives is not the residual stream"),
        ("FNet", {"intermediate_size": 32}, "does not keep padding from the tokens beside it"),
        ("Longformer", {"intermediate_size": 32, "attention_window": 8}, r"tensors of shape \(2, 2, 8, 16\)"),
    ],
)
def test_what_cannot_be_relied_on_is_refused(tmp_path, name, config, told):
    with pytest.raises(UserError, match=f"model .*{name}Model.*{told}"):
        load(tmp_path, name, **config)


def test_a_model_that_does_not_run_is_one_line(tmp_path, monkeypatch):
    def broken(*_given, **_more):
        raise RuntimeError("wants something else")

    monkeypatch.setattr(LanguageModel, "forward", broken)
    with pytest.raises(UserError, match="does not run on rows of token ids, .*: wants something else"):
        load(tmp_path, "Bert", intermediate_size=32)


def test_an_encoder_beside_a_decoder_is_read_without_it(tmp_path):
    """T5 begins no row, and ends each: nothing is put in front of it."""
    lm = load(tmp_path, "T5", d_model=16, num_layers=3, num_decoder_layers=2, d_kv=8, d_ff=32, num_heads=2)
    assert lm.begin_id is None and len(lm.blocks) == 3
    ids_BS = torch.tensor([[5, 6, 7]])
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    own = lm.forward(ids_BS, mask_BS, output_hidden_states=True).hidden_states
    assert lm.activations(ids_BS, mask_BS)[1].equal(own[2])
