"""The forward process against reference values, computed elsewhere in float64, and against its own algebra."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.images import from_uint8
from model.sampling.noise import normal
from training.evaluation.likelihood import bits_per_dim, prior_bpd

LINEAR, COSINE = DiffusionConfig(), DiffusionConfig(schedule="cosine")


@pytest.mark.parametrize(
    ("config", "t", "beta", "alpha_bar"),
    [
        (LINEAR, 0, 1e-4, 0.9999),
        (LINEAR, 1, 1.1991991992e-4, 0.999780092072),
        (LINEAR, 500, 0.01005995996, 0.077796658365),
        (LINEAR, 999, 0.02, 4.03582976538e-5),
        (COSINE, 0, 4.1284224822e-5, 0.999958715775),
        (COSINE, 500, 0.00315569144159, 0.492285172449),
        (COSINE, 998, 0.749999392901, 2.42876690703e-6),
        (COSINE, 999, 0.999, 2.42876690703e-9),
        (replace(LINEAR, num_timesteps=200), 199, 0.1, 3.03183716723e-5),
        (replace(LINEAR, num_timesteps=4000), 3999, 0.005, 4.2466522758e-5),
    ],
)
def test_beta_schedules_give_the_reference_values(
    config: DiffusionConfig, t: int, beta: float, alpha_bar: float
) -> None:
    diffusion = GaussianDiffusion(config)
    assert len(diffusion.betas) == len(diffusion.alphas_cumprod) == config.num_timesteps
    assert diffusion.betas.dtype == diffusion.alphas_cumprod.dtype == np.float64
    assert diffusion.betas[t] == pytest.approx(beta, rel=1e-9, abs=1e-10)
    assert diffusion.alphas_cumprod[t] == pytest.approx(alpha_bar, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize(
    ("config", "t", "half_log_snr"), [(LINEAR, 0, 4.60512), (LINEAR, 999, -5.05884), (COSINE, 999, -9.91794)]
)
def test_log_snr_gives_the_reference_values(config: DiffusionConfig, t: int, half_log_snr: float) -> None:
    assert GaussianDiffusion(config).log_snr()[t] == pytest.approx(half_log_snr, abs=6e-6)


def test_only_the_last_cosine_beta_is_clipped() -> None:
    for steps in (10, 1000, 4000):
        betas = GaussianDiffusion(replace(COSINE, num_timesteps=steps)).betas
        assert (betas == 0.999).tolist() == [False] * (steps - 1) + [True]


def test_the_ends_of_the_linear_schedule_are_settings() -> None:
    betas = GaussianDiffusion(DiffusionConfig(num_timesteps=500, schedule_low=2e-4, schedule_high=0.01)).betas
    assert betas[[0, -1]] == pytest.approx([4e-4, 0.02])
    assert np.allclose(np.diff(betas), np.diff(betas)[0])


def images(n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 4, 5, generator=generator, dtype=torch.float64) * 2 - 1


def noise(n: int, seed: int = 1) -> Tensor:
    return torch.randn(n, 3, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("config", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_q_sample_is_the_closed_form_of_single_steps(config: DiffusionConfig) -> None:
    # Without noise T steps of x ← √(1 - β)·x shrink x0 to √ᾱ·x0; with it the variances add up to 1 - ᾱ.
    diffusion = GaussianDiffusion(config)
    x0, zero = images(1), torch.zeros(1, 3, 4, 5, dtype=torch.float64)
    scale, variance = 1.0, 0.0
    for t, beta in enumerate(diffusion.betas):
        scale, variance = scale * math.sqrt(1 - beta), (1 - beta) * variance + beta
        if t % 111 == 0:
            at = torch.tensor([t])
            torch.testing.assert_close(diffusion.q_sample(x0, at, zero), scale * x0, rtol=1e-10, atol=1e-12)
            std = diffusion.q_sample(zero, at, torch.ones_like(zero))
            torch.testing.assert_close(std**2, torch.full_like(zero, variance), rtol=1e-10, atol=1e-12)


def test_each_image_is_noised_at_its_own_timestep() -> None:
    diffusion, t = GaussianDiffusion(LINEAR), torch.tensor([0, 500, 999])
    together = diffusion.q_sample(images(3), t, noise(3))
    alone = [diffusion.q_sample(images(3)[i : i + 1], t[i : i + 1], noise(3)[i : i + 1]) for i in range(3)]
    assert torch.equal(together, torch.cat(alone))


def test_targets_are_eps_x0_and_v() -> None:
    x0, eps, t = images(4), noise(4), torch.tensor([0, 300, 700, 999])
    alpha_bar = torch.from_numpy(GaussianDiffusion(LINEAR).alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    expected = {"eps": eps, "x0": x0, "v": alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0}
    for prediction, target in expected.items():
        diffusion = GaussianDiffusion(replace(LINEAR, prediction=prediction))
        torch.testing.assert_close(diffusion.target(x0, t, eps), target, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_x0_is_recovered_from_every_target(schedule: str, prediction: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(schedule=schedule, prediction=prediction))
    t = torch.tensor([0, 1, 250, 500, 750, 990])
    x0, eps = images(len(t)), noise(len(t))
    p, q = (torch.from_numpy(c).reshape(-1, 1, 1, 1) for c in diffusion.x0_coefficients(t.numpy()))
    xt, target = diffusion.q_sample(x0, t, eps), diffusion.target(x0, t, eps)
    torch.testing.assert_close(p * xt - q * target, x0, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(diffusion.predicted_x0(target, xt, t), x0, rtol=1e-10, atol=1e-10)


def test_the_mean_uses_the_predicted_image_limited_if_asked() -> None:
    diffusion, t = GaussianDiffusion(LINEAR), torch.tensor([0, 500])
    x0, eps = 1.5 * images(2), noise(2)
    xt = diffusion.q_sample(x0, t, eps)
    for clip, expected in ((False, x0), (True, x0.clamp(-1, 1))):
        mean, _ = diffusion.p_mean_log_variance(eps, xt, t, clip)
        torch.testing.assert_close(mean, diffusion.q_mean(expected, xt, t), rtol=1e-10, atol=1e-10)


def test_tables_move_to_the_device_of_the_images() -> None:
    x, t = torch.zeros(2, 1, 4, 4, device="meta"), torch.tensor([1, 2], device="meta")
    assert GaussianDiffusion(LINEAR).to("meta").q_sample(x, t, x).device.type == "meta"


@pytest.mark.parametrize(("loss_type", "first"), [("l2", 1.0), ("l1", math.sqrt(2 / math.pi))])
def test_a_network_that_says_zero_starts_at_the_known_loss(loss_type: str, first: float) -> None:
    diffusion = GaussianDiffusion(replace(LINEAR, loss_type=loss_type))
    eps = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    loss = diffusion.loss(lambda x, t, y: torch.zeros_like(x), torch.ones_like(eps), None, torch.arange(64), eps)
    assert loss.shape == (64,)
    assert float(loss.mean()) == pytest.approx(first, abs=0.02)


@pytest.mark.parametrize("loss_type", ["l1", "l2", "huber"])
def test_the_loss_is_the_distance_of_each_image_to_its_target(loss_type: str) -> None:
    diffusion = GaussianDiffusion(replace(LINEAR, prediction="v", loss_type=loss_type))
    x0, eps, t, y = images(3).float(), noise(3).float(), torch.tensor([1, 500, 998]), torch.tensor([2, 0, 1])

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return (x * 0.3 + (t / 1000 + y).reshape(-1, 1, 1, 1)).bfloat16()

    difference = network(diffusion.q_sample(x0, t, eps), t, y).float() - diffusion.target(x0, t, eps)
    size = difference.abs()
    assert (size < 1).any()
    assert (size > 1).any()
    huber = torch.where(size < 1, size**2 / 2, size - 0.5)
    expected = {"l1": size, "l2": size**2, "huber": huber}[loss_type]
    loss = diffusion.loss(network, x0, y, t, eps)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.flatten(1).mean(1))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "quadratic"}, "schedule must be one of linear, cosine, sigmoid"),
        ({"prediction": "noise"}, "prediction must be one of eps, x0, v"),
        ({"loss_type": "l3"}, "loss_type must be one of l1, l2, huber"),
        ({"num_timesteps": 1}, "num_timesteps"),
        ({"num_timesteps": 100_001}, "num_timesteps"),
        ({"num_timesteps": 1000.0}, "num_timesteps"),
        ({"num_timesteps": 10}, "betas outside"),  # 0.02 · 1000/10 = 2
        ({"schedule_low": 0.0}, "betas outside"),
        ({"schedule_high": math.nan}, "betas outside"),
    ],
)
def test_settings_that_make_no_diffusion_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**values)


@pytest.mark.parametrize(
    ("config", "t", "log_variance", "c1", "c2"),
    [
        (LINEAR, 0, -9.8167251353, 1, 0),
        (LINEAR, 1, -9.8167251353, 0.54529149951, 0.454708498991),
        (LINEAR, 500, -4.60004973998, 0.00305805707563, 0.994104350757),
        (LINEAR, 999, -3.9120238291, 1.28351487172e-4, 0.989948678268),
        (COSINE, 0, -10.7340825325, 1, 0),
        (COSINE, 500, -5.76162184515, 0.00436786689953, 0.995356279455),
        (COSINE, 998, -0.287690168239, 0.00233767618982, 0.499996963947),
        (COSINE, 999, -0.00100292667467, 0.00155689171549, 0.0316226998741),
    ],
)
def test_the_posterior_has_the_reference_values(
    config: DiffusionConfig, t: int, log_variance: float, c1: float, c2: float
) -> None:
    diffusion = GaussianDiffusion(config)
    assert diffusion.posterior_log_variance[t] == pytest.approx(log_variance, abs=1e-10)
    assert diffusion.posterior_x0[t] == pytest.approx(c1, abs=1e-10)
    assert diffusion.posterior_xt[t] == pytest.approx(c2, abs=1e-10)
    assert math.exp(0.5 * GaussianDiffusion(LINEAR).large_log_variance[0]) == pytest.approx(0.0073846, abs=1e-7)


def test_trained_betas_are_the_schedule() -> None:
    betas = (0.1, 0.05, 0.3)
    diffusion = GaussianDiffusion(DiffusionConfig(3, "trained", trained_betas=betas))
    assert diffusion.alphas_cumprod == pytest.approx([0.9, 0.855, 0.5985])
    assert DiffusionConfig(3, "trained", trained_betas=[*betas]) == diffusion.config
    ended = DiffusionConfig(3, "trained", trained_betas=betas, prediction="v", zero_terminal_snr=True)
    assert GaussianDiffusion(ended).alphas_cumprod[-1] == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trained_betas": ()}, "0 trained_betas for 3 timesteps"),
        ({"trained_betas": (0.1, 0.1)}, "2 trained_betas for 3 timesteps"),
        ({"trained_betas": (0.1, 0.1, 1.0)}, "between 0 and 1, not 1.0"),
        ({"trained_betas": (0.1, 0.0, 0.1)}, "between 0 and 1, not 0.0"),
        ({"trained_betas": (0.1, math.nan, 0.1)}, "between 0 and 1, not nan"),
        ({"trained_betas": (0.1, "0.1", 0.1)}, "between 0 and 1, not '0.1'"),
        ({"trained_betas": (0.1, 0.1, 0.1), "schedule": "linear"}, "need the schedule trained, not linear"),
        ({"trained_betas": (0.999,) * 100, "num_timesteps": 100}, "leave 1e-300 of the image's variance"),
    ],
    ids=str,
)
def test_trained_betas_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffusionConfig(**{"num_timesteps": 3, "schedule": "trained"} | values)


def test_zero_terminal_snr_is_the_published_algorithm() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction="v", zero_terminal_snr=True))
    before = np.sqrt(GaussianDiffusion(LINEAR).alphas_cumprod)
    expected = (before - before[-1]) * before[0] / (before[0] - before[-1])
    np.testing.assert_allclose(np.sqrt(diffusion.alphas_cumprod), expected, atol=1e-10)
    assert diffusion.alphas_cumprod[-1] == 0
    assert diffusion.betas[0] == LINEAR.betas()[0]
    with pytest.raises(ValueError, match="zero_terminal_snr needs prediction"):
        DiffusionConfig(zero_terminal_snr=True)


@pytest.mark.parametrize("t", [0, 300, 999])
def test_loss_weights_are_the_published_ones(t: int) -> None:
    ab = GaussianDiffusion(LINEAR).alphas_cumprod[t]
    snr = ab / (1 - ab)

    def weight(weighting: str, prediction: str) -> float:
        config = replace(LINEAR, weighting=weighting, prediction=prediction)
        return float(GaussianDiffusion(config).loss_weights()[t])

    assert weight("min_snr", "eps") == pytest.approx(min(snr, 5) / snr, rel=1e-10)
    assert weight("min_snr", "x0") == pytest.approx(min(snr, 5), rel=1e-10)
    assert weight("min_snr", "v") == pytest.approx(min(snr, 5) / (snr + 1), rel=1e-10)
    assert weight("p2", "eps") == pytest.approx(1 / (1 + snr), rel=1e-10)
    assert {weight("none", prediction) for prediction in ("eps", "x0", "v")} == {1.0}


@pytest.mark.parametrize("weighting", ["min_snr", "p2"])
def test_the_same_error_weighs_the_same_whatever_is_predicted(weighting: str) -> None:
    x0, eps, t = images(3), noise(3), torch.tensor([10, 400, 900])
    wrong = x0 + 0.1 * torch.sin(40 * x0)
    losses = []
    for prediction in ("eps", "x0", "v"):
        diffusion = GaussianDiffusion(replace(LINEAR, weighting=weighting, prediction=prediction))
        alpha, sigma = diffusion.alpha_sigma(t, x0)
        wrong_eps = eps + alpha / sigma * (x0 - wrong)
        said = {"eps": wrong_eps, "x0": wrong, "v": alpha * wrong_eps - sigma * wrong}[prediction]
        losses.append(diffusion.loss(lambda x, t, y, said=said: said, x0, None, t, eps))  # type: ignore[misc]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(losses[2], losses[1], rtol=1e-3, atol=1e-9)


def test_the_hybrid_losss_bound_trains_only_the_variance() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(500, variance="learned_range"))
    x0, eps, t = images(3).float(), noise(3).float(), torch.tensor([0, 200, 499])
    x0 = torch.round((x0 + 1) * 127.5) / 127.5 - 1
    out = torch.randn(3, 6, 4, 5, generator=torch.Generator().manual_seed(3), requires_grad=True)
    loss = diffusion.loss(lambda x, t, y: out, x0, None, t, eps)
    plain = ((out[:, :3] - eps) ** 2).mean(dim=(1, 2, 3))
    bound = diffusion.vb_term_bpd(x0, diffusion.q_sample(x0, t, eps), t, out)
    torch.testing.assert_close(loss, plain + 0.5 * bound)
    (gradient,) = torch.autograd.grad(loss.sum(), out, retain_graph=True)
    (of_plain,) = torch.autograd.grad(plain.sum(), out)
    assert torch.equal(gradient[:, :3], of_plain[:, :3])
    assert gradient[:, 3:].any()


def test_learned_variance_lies_between_its_ends() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="learned_range"))
    xt, t = images(1), torch.tensor([400])
    for v, expected in ((-1.0, diffusion.posterior_log_variance[400]), (1.0, math.log(diffusion.betas[400]))):
        out = torch.cat([xt, torch.full_like(xt, v)], dim=1)
        _, log_variance = diffusion.p_mean_log_variance(out, xt, t)
        assert log_variance.shape == xt.shape
        assert float(log_variance[0, 0, 0, 0]) == pytest.approx(expected, abs=1e-10)


def test_the_prior_is_the_published_one() -> None:
    x0 = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)  # E[x²] = ¼
    assert float(prior_bpd(GaussianDiffusion(LINEAR), x0)) == pytest.approx(7.3e-6, abs=1e-7)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bits_per_dimension_add_up(variance: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(50, prediction="x0", variance=variance))
    x0 = torch.round((0.9 * images(2) + 1) * 127.5) / 127.5 - 1  # no pixel in a bin at the edge
    found = bits_per_dim(diffusion, lambda x, t, y: x0, x0, None, [1, 2], [0, 0])
    # The network knows the image: only the width of its Gaussians costs, and the decoder's bin
    ratio = diffusion.posterior_log_variance - (
        diffusion.large_log_variance if variance == "fixed_large" else diffusion.posterior_log_variance
    )
    divergence = 0.5 * (np.exp(ratio) - 1 - ratio) / math.log(2)
    np.testing.assert_allclose(found.terms[:, 1:], np.broadcast_to(divergence[1:], (2, 49)), atol=1e-10)
    torch.testing.assert_close(found.total, found.prior + found.terms.sum(dim=1))
    std = math.exp(0.5 * diffusion.posterior_log_variance[0])
    inside = math.erf(1 / 255 / std / math.sqrt(2))
    assert float(found.terms[:, 0].mean()) == pytest.approx(-math.log2(inside), abs=0.005)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_bits_per_dimension_match_the_written_out_formulas(variance: str) -> None:
    """Scalars, float64, with the error function's own approximation (Ho et al. 2020, eq. 5, 7, 13; section 4.2)."""
    diffusion = GaussianDiffusion(DiffusionConfig(6, "cosine", variance=variance))
    x0 = from_uint8(torch.tensor([0, 255, 7, 130], dtype=torch.uint8)).double().reshape(1, 1, 2, 2)
    seed, index = 11, 3

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return 0.3 * x + 0.01 * t.reshape(-1, 1, 1, 1)

    found = bits_per_dim(diffusion, network, x0, None, [seed], [index])

    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(1 - f((t + 1) / 6) / f(t / 6), 0.999) for t in range(6)]
    bars = [math.prod(1 - b for b in betas[: t + 1]) for t in range(6)]

    def kl(m1: float, v1: float, m2: float, v2: float) -> float:
        return 0.5 * (math.log(v2 / v1) + (v1 + (m1 - m2) ** 2) / v2 - 1)

    def cdf(z: float) -> float:
        return 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    def posterior(t: int, x: float, start: float) -> tuple[float, float]:
        before = bars[t - 1] if t else 1.0
        mean = betas[t] * math.sqrt(before) / (1 - bars[t]) * start
        return mean + (1 - before) * math.sqrt(1 - betas[t]) / (1 - bars[t]) * x, betas[t] * (1 - before) / (
            1 - bars[t]
        )

    small = [posterior(max(t, 1), 0, 0)[1] for t in range(6)]  # at t = 0 that of t = 1
    terms = []
    for t in range(6):
        noise = normal(seed, index, t + 1, (1, 2, 2)).flatten().tolist()
        nats = []
        for start, z in zip(x0.flatten().tolist(), noise, strict=True):
            x = math.sqrt(bars[t]) * start + math.sqrt(1 - bars[t]) * z
            eps = 0.3 * x + 0.01 * t
            guess = min(1.0, max(-1.0, (x - math.sqrt(1 - bars[t]) * eps) / math.sqrt(bars[t])))
            mean, _ = posterior(t, x, guess)
            v = small[t] if variance == "fixed_small" or t == 0 else betas[t]
            if t:
                nats.append(kl(*posterior(t, x, start), mean, v))
            else:
                high = 1.0 if start > 0.999 else cdf((start + 1 / 255 - mean) / math.sqrt(v))
                low = 0.0 if start < -0.999 else cdf((start - 1 / 255 - mean) / math.sqrt(v))
                nats.append(-math.log(max(high - low, 1e-12)))
        terms.append(sum(nats) / 4 / math.log(2))
    prior = sum(kl(math.sqrt(bars[5]) * s, 1 - bars[5], 0, 1) for s in x0.flatten().tolist()) / 4 / math.log(2)
    assert found.terms[0].tolist() == pytest.approx(terms, rel=1e-7)
    assert float(found.prior) == pytest.approx(prior, rel=1e-6)
    assert float(found.total) == pytest.approx(prior + sum(terms), rel=1e-7)
