"""fipo.export: a saved SAE takes raw activations and gives what the trained one gave; SAELens reads the same folder."""

import json

import pytest
import safetensors.torch
import torch
from toys import LATENTS, WIDTH, seeded

from fipo.activations import build_activation
from fipo.errors import UserError
from fipo.export import load_sae, save_sae
from fipo.files import read_json, write_json
from fipo.sae import SAE

ARCHITECTURES = ("relu", "topk", "batchtopk", "jumprelu")
CONFIG_KEYS = [
    *("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "reshape_activations"),
    "architecture",
]
METADATA_KEYS = {
    *("sae_lens_version", "sae_lens_training_version", "model_name", "hook_name", "hook_layer", "hook_head_index"),
    *("context_size", "prepend_bos", "dataset_path", "seqpos_slice", "model_class_name"),
    *("model_from_pretrained_kwargs", "exclude_special_tokens", "neuronpedia_id"),
}


def trained(architecture):
    """An SAE with nothing zero or one; decoder rows of unit norm, as training leaves them, only where it matters."""
    generator = seeded()
    sae = SAE(WIDTH, LATENTS, build_activation(architecture, LATENTS, 3), generator=generator)
    with torch.no_grad():
        for parameter in (sae.enc_FD, sae.enc_bias_F, sae.dec_FD, sae.dec_bias_D, sae.mean_D):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.mean_D.mul_(40)
        sae.scale.fill_(0.07)
        if architecture == "topk":  # folding other norms would change which k are the largest
            sae.normalise_decoder()
        if architecture == "batchtopk":
            sae.activation.threshold_F.fill_(0.8)
        if architecture == "jumprelu":
            sae.activation.log_threshold_F.copy_(torch.rand(LATENTS, generator=generator).add(0.2).log())
    return sae.eval()


def raw(sae, count=500):
    """Activations with the mean and scale that the SAE was trained for."""
    return torch.randn(count, WIDTH, generator=seeded(3)) / sae.scale + sae.mean_D


def save(folder, sae):
    given = {"model": "some/model", "layer": 3, "context": 128, "dataset": "some/text"}
    return save_sae(folder, sae, **given, beside={"sigma_F": torch.arange(float(LATENTS))})


@pytest.fixture(params=ARCHITECTURES)
def sae(request):
    return trained(request.param)


@pytest.fixture
def folder(tmp_path, sae):
    save(tmp_path / "layer_3", sae)
    return tmp_path / "layer_3"


def change_tensors(folder, change):
    path = folder / "sae_weights.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def relative(given, expected):
    return ((given - expected).norm() / expected.norm()).item()


@torch.no_grad()
def test_reconstructs_raw_activations(sae, folder):
    loaded, acts_BD = load_sae(folder), raw(sae)
    assert relative(loaded(acts_BD), sae(acts_BD)) < 1e-5
    norm_F = sae.dec_FD.norm(dim=1)
    assert relative(loaded.encode(acts_BD), sae.encode(acts_BD) * norm_F / sae.scale) < 1e-5
    assert 0.5 < (loaded.encode(acts_BD) > 0).sum(1).float().mean() < LATENTS - 0.5
    assert not loaded.training


def test_decoder_rows_are_of_unit_norm(folder):
    torch.testing.assert_close(load_sae(folder).dec_FD.norm(dim=1), torch.ones(LATENTS))


def test_saving_changes_nothing(tmp_path, sae):
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    save(tmp_path, sae)
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_files_and_keys_are_those_of_saelens(tmp_path, architecture):
    returned = save(tmp_path, trained(architecture))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cfg.json",
        "fipo_statistics.safetensors",
        "sae_weights.safetensors",
    ]
    config = json.loads((tmp_path / "cfg.json").read_text())
    name = {"relu": "standard", "topk": "topk"}.get(architecture, "jumprelu")
    own = ["k", "rescale_acts_by_decoder_norm"] if architecture == "topk" else []
    assert config == returned and list(config) == [*CONFIG_KEYS, *own, "metadata"]
    assert config["metadata"].keys() == METADATA_KEYS
    assert config["architecture"] == name and config["d_in"] == WIDTH and config["d_sae"] == LATENTS
    assert config["dtype"] == "float32" and config["normalize_activations"] == "none"
    assert config["metadata"]["sae_lens_version"].startswith("6.")
    assert config["metadata"]["hook_name"] == "blocks.3.hook_resid_post" and config["metadata"]["hook_layer"] == 3
    assert config["metadata"]["context_size"] == 128 and config["metadata"]["dataset_path"] == "some/text"
    tensors = safetensors.torch.load_file(tmp_path / "sae_weights.safetensors")
    shapes = {"W_enc": (WIDTH, LATENTS), "b_enc": (LATENTS,), "W_dec": (LATENTS, WIDTH), "b_dec": (WIDTH,)}
    shapes |= {"threshold": (LATENTS,)} if name == "jumprelu" else {}
    assert {name: tuple(value.shape) for name, value in tensors.items()} == shapes
    assert all(value.dtype == torch.float32 for value in tensors.values())
    beside = safetensors.torch.load_file(tmp_path / "fipo_statistics.safetensors")
    assert torch.equal(beside["sigma_F"], torch.arange(float(LATENTS)))


def test_dead_row_of_zeros_stays_finite(tmp_path):
    sae = trained("relu")
    with torch.no_grad():
        sae.dec_FD[2] = 0
    save(tmp_path, sae)
    acts_BD = raw(sae)
    assert relative(load_sae(tmp_path)(acts_BD), sae(acts_BD)) < 1e-5


@pytest.mark.parametrize("centred", [True, False])
def test_reads_both_of_saelens_conventions(tmp_path, centred):
    sae = trained("relu")
    save(tmp_path, sae)
    config = read_json(tmp_path / "cfg.json")
    tensors = safetensors.torch.load_file(tmp_path / "sae_weights.safetensors")
    write_json(tmp_path / "cfg.json", config | {"apply_b_dec_to_input": centred})
    acts_BD = raw(sae)
    codes_BF = ((acts_BD - tensors["b_dec"] * centred) @ tensors["W_enc"] + tensors["b_enc"]).relu()
    assert relative(load_sae(tmp_path)(acts_BD), codes_BF @ tensors["W_dec"] + tensors["b_dec"]) < 1e-5


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_wrong_tensors(folder, name):
    path = folder / "sae_weights.safetensors"
    good = path.read_bytes()

    def break_it(tensors):
        tensors[name][-1] = float("nan")

    def shorten(tensors):
        tensors[name] = tensors[name][:-1].contiguous()

    for change in (break_it, shorten, lambda tensors: tensors.pop(name)):
        path.write_bytes(good)
        change_tensors(folder, change)
        with pytest.raises(UserError, match=f"layer_3: tensor {name} is .* expected finite"):
            load_sae(folder)


@pytest.mark.parametrize("architecture", ["jumprelu", "batchtopk"])
def test_wrong_threshold(tmp_path, architecture):
    save(tmp_path, trained(architecture))

    def break_it(tensors):
        tensors["threshold"][0] = float("nan")

    change_tensors(tmp_path, break_it)
    with pytest.raises(UserError, match="tensor threshold"):
        load_sae(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.pop("threshold"))
    with pytest.raises(UserError, match="threshold"):
        load_sae(tmp_path)


def test_wrong_threshold_shape(tmp_path):
    save(tmp_path, trained("jumprelu"))
    change_tensors(tmp_path, lambda tensors: tensors.update(threshold=torch.ones(LATENTS - 1)))
    with pytest.raises(UserError, match="tensor threshold"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architecture": "gated"}, "architecture is gated; expected one of standard, topk, jumprelu"),
        ({"d_sae": LATENTS + 1}, "expected finite"),
        ({"normalize_activations": "expected_average_only_in"}, "normalize_activations is not folded"),
        ({"d_in": None}, "d_in is None; expected int"),
        ({"d_in": True}, "d_in is True; expected int"),
        ({"d_in": float(WIDTH)}, "d_in is 8.0; expected int"),
        ({"d_sae": 10**12}, "expected finite"),
        ({"d_sae": -1}, "d_sae is -1; expected int"),
        ({"architecture": ["standard"]}, "architecture is .'standard'.; expected str"),
        ({"apply_b_dec_to_input": 1}, "apply_b_dec_to_input is 1; expected bool"),
        ({"rescale_acts_by_decoder_norm": "yes"}, "rescale_acts_by_decoder_norm is 'yes'; expected bool"),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}},
            "activation_fn_str of a standard SAE is 'topk'",
        ),
        ({"activation_fn": "tanh-relu"}, "activation_fn of a standard SAE is 'tanh-relu'; expected relu"),
        ({"reshape_activations": "hook_z"}, "reshape_activations is not folded"),
        ({"architecture": "topk", "k": LATENTS + 1}, "k is 17; expected at most d_sae, 16"),
        ({"architecture": "topk", "k": "3"}, "k is '3'; expected int"),
        ({"architecture": "topk", "k": 0}, "k is 0; expected int"),
        ({"architecture": "jumprelu", "d_sae": 10**12}, "expected finite"),
    ],
)
def test_wrong_config(tmp_path, change, text):
    save(tmp_path, trained("relu"))
    write_json(tmp_path / "cfg.json", read_json(tmp_path / "cfg.json") | change)
    with pytest.raises(UserError, match=text):
        load_sae(tmp_path)


@pytest.mark.parametrize("content", ["[]", "1", "[" * 10_000, '{"d_in": NaN}', '{"d_in": 1, "d_in": 1}', ""])
def test_a_config_that_is_no_mapping(tmp_path, content):
    save(tmp_path, trained("relu"))
    (tmp_path / "cfg.json").write_text(content)
    with pytest.raises(UserError, match="cfg.json"):
        load_sae(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(folder, dtype):
    change_tensors(folder, lambda tensors: tensors.update(b_dec=torch.ones(WIDTH).to(dtype)))
    with pytest.raises(UserError, match=f"layer_3: tensor b_dec is {dtype} .8,. or not finite; expected finite"):
        load_sae(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_other_floats(folder, dtype):
    change_tensors(folder, lambda tensors: tensors.update(b_dec=tensors["b_dec"].to(dtype)))
    sae = load_sae(folder)
    assert sae.mean_D.dtype == torch.float32


def test_weights_too_large_for_float32(folder):
    change_tensors(folder, lambda tensors: tensors.update(b_dec=torch.full((WIDTH,), 1e300, dtype=torch.float64)))
    with pytest.raises(UserError, match="tensor b_dec is torch.float64 .8,. or not finite"):
        load_sae(folder)


def test_an_unknown_tensor(folder):
    change_tensors(folder, lambda tensors: tensors.update(scaling_factor=torch.ones(LATENTS)))
    with pytest.raises(UserError, match="tensor scaling_factor is unknown; expected W_enc"):
        load_sae(folder)


def with_other_norms(tensors):
    """The same SAE as its trainer may leave it: decoder rows of any norm, and what comes before them against that."""
    scale_F = (2 * torch.randn(LATENTS, generator=seeded(8))).exp()
    tensors["W_dec"] = tensors["W_dec"] * scale_F[:, None]
    for name in ("W_enc", "b_enc", "threshold"):
        if name in tensors:
            tensors[name] = tensors[name] / scale_F


@torch.no_grad()
def test_decoder_norms_of_saes_from_elsewhere_are_folded(sae, folder, capsys):
    """Which latents are on, their codes in units of the activations, and the reconstruction."""
    acts_BD, unit = raw(sae), load_sae(folder)
    change_tensors(folder, with_other_norms)
    loaded = load_sae(folder)
    torch.testing.assert_close(loaded.dec_FD, unit.dec_FD)
    torch.testing.assert_close(loaded.encode(acts_BD), unit.encode(acts_BD), rtol=1e-4, atol=1e-4)
    assert relative(loaded(acts_BD), unit(acts_BD)) < 1e-5 and not capsys.readouterr().err


@pytest.mark.usefixtures("sae")
@pytest.mark.parametrize("rounding", [0, 2**-21])
def test_unit_rows_are_read_bit_for_bit(folder, rounding):
    change_tensors(folder, lambda tensors: tensors["W_dec"].mul_(1 + rounding))
    loaded, tensors = load_sae(folder), safetensors.torch.load_file(folder / "sae_weights.safetensors")
    assert loaded.enc_FD.T.equal(tensors["W_enc"]) and loaded.enc_bias_F.equal(tensors["b_enc"])
    assert loaded.dec_FD.equal(tensors["W_dec"]) and loaded.mean_D.equal(tensors["b_dec"])
    if "threshold" in tensors:
        assert loaded.activation.log_threshold_F.equal(tensors["threshold"].log())


@torch.no_grad()
def test_a_row_of_zeros_has_codes_of_nothing(tmp_path):
    save(tmp_path, trained("relu"))
    change_tensors(tmp_path, lambda tensors: tensors["W_dec"][3].zero_())
    loaded = load_sae(tmp_path)
    codes_BF = loaded.encode(raw(trained("relu")))
    assert not loaded.dec_FD[3].any() and codes_BF.isfinite().all() and codes_BF[:, 3].max() < 1e-5 < codes_BF.max()


@torch.no_grad()
def test_a_topk_whose_choice_folding_would_change_is_left_and_warned_of(tmp_path, capsys):
    sae = trained("topk")
    config = save(tmp_path, sae)
    write_json(tmp_path / "cfg.json", config | {"rescale_acts_by_decoder_norm": False})
    codes_BF = load_sae(tmp_path).encode(raw(sae))
    assert not capsys.readouterr().err, "the rows are of unit norm"
    change_tensors(tmp_path, lambda tensors: tensors.update(W_dec=2 * tensors["W_dec"]))
    assert load_sae(tmp_path).encode(raw(sae)).equal(codes_BF)
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("warning: 16 decoder rows of") and "not of unit norm (up to 2)" in told


def test_norms_too_large_to_fold(tmp_path):
    save(tmp_path, trained("relu"))
    change_tensors(tmp_path, lambda tensors: [tensors[name].mul_(1e25) for name in ("W_enc", "W_dec")])
    with pytest.raises(UserError, match="tensor W_enc is .* or not finite"):
        load_sae(tmp_path)


@pytest.mark.parametrize("key", ["architecture", "d_in", "d_sae", "k"])
def test_missing_config_key(tmp_path, key):
    save(tmp_path, trained("topk"))
    config = read_json(tmp_path / "cfg.json")
    del config[key]
    write_json(tmp_path / "cfg.json", config)
    with pytest.raises(UserError, match=f"cfg.json lacks '{key}'; expected an SAE in SAELens' format"):
        load_sae(tmp_path)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_missing_file(tmp_path, name):
    save(tmp_path, trained("relu"))
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        load_sae(tmp_path)


@torch.no_grad()
def test_loads_in_sae_lens(sae, folder):
    """Skipped where SAELens is not installed; its tests run in an isolated environment."""
    sae_lens = pytest.importorskip("sae_lens")
    theirs, acts_BD = sae_lens.SAE.load_from_disk(folder), raw(sae)
    assert relative(theirs(acts_BD), sae(acts_BD)) < 1e-4
    assert relative(theirs.encode(acts_BD), load_sae(folder).encode(acts_BD)) < 1e-4
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.model_name == "some/model"
    theirs.fold_W_dec_norm()
    assert relative(theirs(acts_BD), sae(acts_BD)) < 1e-4


def test_folders_may_be_given_as_text(tmp_path):
    sae = trained("relu")
    save_sae(str(tmp_path), sae, model="m", layer=0, context=8, dataset="d", beside={})
    acts_BD = torch.randn(5, WIDTH, generator=seeded(5))
    assert load_sae(str(tmp_path)).encode(acts_BD).equal(load_sae(tmp_path).encode(acts_BD))


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu"])
def test_codes_of_texts_by_positions_and_of_one_token(architecture, tmp_path):
    save(tmp_path, trained(architecture))
    sae, acts_BSD = load_sae(tmp_path), torch.randn(3, 4, WIDTH, generator=seeded(5))
    codes_BSF = sae.encode(acts_BSD)
    assert codes_BSF.shape == (3, 4, LATENTS) and codes_BSF.flatten(0, 1).equal(sae.encode(acts_BSD.flatten(0, 1)))
    assert sae(acts_BSD).shape == acts_BSD.shape
    assert torch.allclose(sae(acts_BSD).flatten(0, 1), sae(acts_BSD.flatten(0, 1)))
    assert sae.encode(acts_BSD[0, 0]).shape == (LATENTS,) and sae(acts_BSD[0, 0]).shape == (WIDTH,)


def test_a_loaded_sae_runs_in_the_dtype_it_is_given(tmp_path):
    save(tmp_path, trained("relu"))
    acts_BD = torch.randn(5, WIDTH, generator=seeded(5))
    exact_BF = load_sae(tmp_path).encode(acts_BD)
    for dtype, tolerance in ((torch.bfloat16, 0.05), (torch.float64, 1e-6)):
        codes_BF = load_sae(tmp_path).to(dtype).encode(acts_BD)
        assert codes_BF.dtype == dtype and torch.allclose(
            codes_BF.float(), exact_BF, atol=tolerance * exact_BF.max().item()
        )


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu"])
def test_no_tokens_have_no_codes(architecture, tmp_path):
    save(tmp_path, trained(architecture))
    sae = load_sae(tmp_path)
    assert sae.encode(torch.zeros(0, WIDTH)).shape == (0, LATENTS)
    assert sae.encode(torch.zeros(3, 0, WIDTH)).shape == (3, 0, LATENTS)
    assert sae.decode(torch.zeros(3, 0, LATENTS)).shape == (3, 0, WIDTH)
