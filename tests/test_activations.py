"""fipo.activations against brute force and closed forms; `forward` never changes state."""

import pytest
import torch
import toys

from fipo.activations import BatchTopK, JumpReLU, ReLU, TopK, build_activation, threshold_of

ARCHITECTURES = ["relu", "topk", "batchtopk", "jumprelu"]


def pre_codes(seed: int = 0, batch: int = 7, latents: int = 11) -> torch.Tensor:
    return torch.randn(batch, latents, generator=toys.seeded(seed))


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_unchanged(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_names_give_the_classes():
    classes = [type(build_activation(name, 5, 2)) for name in ARCHITECTURES]
    assert classes == [ReLU, TopK, BatchTopK, JumpReLU]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("training", [True, False])
def test_forward_changes_neither_state_nor_input(name, training):
    activation = build_activation(name, 11, 3).train(training)
    activation.observe(pre_codes(5).relu())
    before, pre_BF = snapshot(activation), pre_codes()
    codes_BF = activation(pre_BF)
    assert_unchanged(activation, before)
    assert torch.equal(pre_BF, pre_codes()) and torch.equal(codes_BF, activation(pre_BF))
    assert (codes_BF >= 0).all() and (codes_BF > 0).any()
    kept_BF = codes_BF > 0
    assert torch.equal(codes_BF[kept_BF], pre_BF[kept_BF])


@pytest.mark.parametrize("seed", range(5))
def test_topk_keeps_the_k_largest_positive_of_each_token(seed):
    pre_BF = pre_codes(seed)
    expected_BF = torch.zeros_like(pre_BF)
    for token, row in enumerate(pre_BF.tolist()):
        for latent in sorted(range(len(row)), key=row.__getitem__)[-4:]:
            expected_BF[token, latent] = max(row[latent], 0.0)
    assert torch.equal(TopK(4)(pre_BF), expected_BF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_topk_of_fewer_latents_than_k_keeps_all(dtype):
    pre_BF = torch.randn(4, 5, generator=toys.seeded()).to(dtype)
    assert TopK(9)(pre_BF).equal(pre_BF.relu())
    assert TopK(9)(pre_BF, as_pairs=True).dense().equal(pre_BF.float().relu())


def test_topk_with_few_positive_values_has_fewer_codes():
    codes_BF = TopK(3)(torch.tensor([[-1.0, 2.0, -3.0, -4.0]]))
    assert torch.equal(codes_BF, torch.tensor([[0.0, 2.0, 0.0, 0.0]]))


def brute_batchtopk(pre_BF: torch.Tensor, k: int) -> torch.Tensor:
    flat = pre_BF.flatten().tolist()
    kept = sorted(range(len(flat)), key=flat.__getitem__)[-k * pre_BF.shape[0] :]
    result = torch.zeros(len(flat))
    for place in kept:
        result[place] = max(flat[place], 0.0)
    return result.view_as(pre_BF)


@pytest.mark.parametrize("seed", range(5))
def test_batchtopk_keeps_exactly_the_k_b_largest(seed):
    pre_BF = pre_codes(seed)
    codes_BF = BatchTopK(11, 2)(pre_BF)
    assert (codes_BF > 0).sum() == 2 * 7
    assert torch.equal(codes_BF, brute_batchtopk(pre_BF, 2))


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.3, 1.0, 2.0, 100.0])
@pytest.mark.parametrize("k", [1, 3, 8, 11, 20])
def test_the_least_code_of_the_last_batch_never_changes_a_training_code(threshold, k):
    """The shortcut in the search: below, near and above the true boundary."""
    activation, pre_BF = BatchTopK(11, k), pre_codes()
    activation.latest.fill_(threshold)
    assert torch.equal(activation(pre_BF), brute_batchtopk(pre_BF, k))


def test_batchtopk_keeps_all_ties_and_nothing_negative():
    codes_BF = BatchTopK(3, 1)(torch.tensor([[1.0, 1.0, 0.5], [1.0, -1.0, -2.0]]))
    assert torch.equal(codes_BF, torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]))
    assert not BatchTopK(11, 2)(-pre_codes().abs()).any()


def test_batchtopk_threshold_and_mean_are_bias_corrected_emas_of_the_smallest_and_the_mean_code():
    activation, smallest, means = BatchTopK(11, 2, decay=0.9), [], []
    for seed in range(6):
        codes_BF = activation(pre_codes(seed))
        smallest.append(codes_BF[codes_BF > 0].min().item())
        means.append(codes_BF[codes_BF > 0].mean().item())
        activation.observe(codes_BF)
        weights = [0.9 ** (len(smallest) - 1 - age) for age in range(len(smallest))]
        for found, values in ((activation.threshold, smallest), (activation.mean, means)):
            expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            assert found.item() == pytest.approx(expected, rel=1e-5)


def test_shortage_is_the_smallest_code_over_the_mean_one():
    """Of equal codes it is 1; before any code, and of activations without a budget, 0."""
    activation = BatchTopK(2, 2)
    assert activation.shortage() == 0 == ReLU().shortage()
    activation.observe(torch.tensor([[0.0, 0.5], [1.5, 0.0]]))
    assert activation.shortage() == pytest.approx(0.5)
    activation.observe(torch.zeros(2, 2))
    assert activation.shortage() == pytest.approx(0.5)


def test_batchtopk_constant_boundary_is_the_threshold_from_the_first_step():
    activation = BatchTopK(2, 2)
    for _ in range(3):
        activation.observe(torch.tensor([[0.0, 0.7], [0.9, 0.0]]))
        assert activation.threshold.item() == pytest.approx(0.7, rel=1e-6)


def test_batchtopk_in_evaluation_is_the_threshold_token_by_token():
    activation = BatchTopK(11, 2).eval()
    activation.threshold_F.fill_(0.4)
    pre_BF = pre_codes()
    assert torch.equal(activation(pre_BF), pre_BF * (pre_BF > 0.4))
    assert torch.equal(activation(pre_BF)[3:4], activation(pre_BF[3:4]))
    assert not activation(torch.full((1, 11), 0.4)).any()  # SAELens' JumpReLU leaves out what is at the threshold


@pytest.mark.parametrize("training", [True, False])
def test_batchtopk_gradient_is_one_on_kept_codes(training):
    activation = BatchTopK(11, 2).train(training)
    pre_BF = pre_codes().requires_grad_()
    codes_BF = activation(pre_BF)
    codes_BF.sum().backward()
    assert torch.equal(pre_BF.grad, (codes_BF > 0).float())


def jumprelu() -> tuple[JumpReLU, torch.Tensor, torch.Tensor]:
    """One with three thresholds, its input, and the upstream gradient."""
    activation = JumpReLU(3, bandwidth=0.4).double()
    activation.log_threshold_F.data = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64).log()
    generator = toys.seeded()
    pre_BF = 2 * torch.rand(50, 3, generator=generator, dtype=torch.float64) - 0.5
    return activation, pre_BF.requires_grad_(), torch.randn(50, 3, generator=generator, dtype=torch.float64)


def test_jumprelu_values():
    activation, pre_BF, _ = jumprelu()
    assert torch.equal(activation(pre_BF), pre_BF * (pre_BF > torch.tensor([0.2, 0.5, 1.0])))


def test_jumprelu_gradient_is_the_straight_through_formula():
    """d/dpre = 1[pre > θ]; d/dθ = -pre/ε inside the rectangle |pre - θ| < ε/2; d/d log θ is θ times that."""
    activation, pre_BF, upstream_BF = jumprelu()
    (activation(pre_BF) * upstream_BF).sum().backward()
    theta_F = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    pre_BF.grad, grad_BF = None, pre_BF.grad
    assert torch.allclose(grad_BF, upstream_BF * (pre_BF > theta_F))
    inside_BF = ((pre_BF - theta_F).abs() < 0.2).double()
    expected_F = theta_F * -(upstream_BF * pre_BF * inside_BF).sum(0) / 0.4
    assert inside_BF.any() and torch.allclose(activation.log_threshold_F.grad, expected_F)


def test_jumprelu_sparsity_is_l0_with_the_step_s_gradient():
    activation, pre_BF, _ = jumprelu()
    codes_BF = activation(pre_BF)
    l0 = activation.sparsity(pre_BF, codes_BF, torch.eye(3))
    assert l0.item() == pytest.approx((codes_BF > 0).sum().item() / 50)
    l0.backward()
    theta_F = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    expected_F = -theta_F * ((pre_BF - theta_F).abs() < 0.2).sum(0) / 0.4 / 50
    assert pre_BF.grad is None or not pre_BF.grad.any()
    assert torch.allclose(activation.log_threshold_F.grad, expected_F, rtol=1e-5)


def test_l1_is_the_mean_over_tokens_weighted_by_row_norms():
    codes_BF, dec_FD = pre_codes().relu(), torch.randn(11, 4, generator=toys.seeded(1))
    expected = sum(codes_BF[b, f].item() * dec_FD[f].norm().item() for b in range(codes_BF.shape[0]) for f in range(11))
    assert ReLU().sparsity(pre_codes(), codes_BF, dec_FD).item() == pytest.approx(expected / 7, rel=1e-5)


def test_l1_is_blind_to_the_scale_of_a_row():
    codes_BF, dec_FD = pre_codes().relu(), torch.randn(11, 4, generator=toys.seeded(1))
    scale_F = torch.linspace(0.1, 5, 11)
    plain = ReLU().sparsity(pre_codes(), codes_BF, dec_FD)
    scaled = ReLU().sparsity(pre_codes(), codes_BF / scale_F, dec_FD * scale_F[:, None])
    assert torch.allclose(plain, scaled) and plain > 0


@pytest.mark.parametrize("name", ["topk", "batchtopk"])
def test_budgeted_activations_cost_nothing(name):
    activation = build_activation(name, 11, 2)
    assert activation.sparse and activation.sparsity(pre_codes(), pre_codes().relu(), torch.eye(11)) == 0


@pytest.mark.parametrize("name", ["relu", "jumprelu", "batchtopk"])
def test_the_threshold_says_all(name):
    activation, pre_BF = build_activation(name, pre_codes().shape[1], 2).eval(), pre_codes()
    if name == "batchtopk":
        activation.threshold_F.fill_(0.3)
    with torch.no_grad():
        expected_BF = activation(pre_BF)
        assert torch.equal(torch.where(pre_BF > threshold_of(activation), pre_BF, 0), expected_BF)
    assert 0 < (expected_BF > 0).sum() < (pre_BF > 0).sum() or name == "relu"


def test_codes_that_vie_with_each_other_have_no_threshold():
    assert threshold_of(TopK(2).eval()) is None and threshold_of(BatchTopK(11, 2).train()) is None
