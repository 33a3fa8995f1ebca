"""Our tables, run through `sample` in float64, against diffusers' schedulers, textbook formulas and known numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, scheduling_ddpm
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion, Network
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import (
    COEFFICIENTS,
    DEFAULT_STEPS,
    InvalidSamplingParams,
    SamplingParams,
    SamplingSchedule,
    make_schedule,
)
from model.sampling.solvers import SAMPLERS
from model.sampling.step import apply_step, cfg_forward, sample
from model.sampling.timestep_spacing import SPACINGS, make_timesteps

LINEAR = GaussianDiffusion(DiffusionConfig())
SHAPE, SEEDS, INDICES = (1, 4, 4), [7, 8], [0, 5]
THEIR_NAMES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def diffusion_of(betas: str, prediction: str) -> GaussianDiffusion:
    return GaussianDiffusion(DiffusionConfig(schedule=betas, prediction=prediction))


def network_of(diffusion: GaussianDiffusion) -> Network:
    """A smooth network whose x0 leaves [-1, 1] in part. It depends on x, t and the pixel, in float64."""
    alpha_bar = torch.from_numpy(diffusion.alphas_cumprod)

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        ab = alpha_bar[t].reshape(-1, 1, 1, 1)
        x0 = 1.3 * torch.sin(x + torch.linspace(0, 3, 16).reshape(SHAPE) + t.reshape(-1, 1, 1, 1) / 300)
        eps = (x - ab.sqrt() * x0) / (1 - ab).sqrt()
        return {"eps": eps, "x0": x0, "v": ab.sqrt() * eps - (1 - ab).sqrt() * x0}[diffusion.config.prediction]

    return network


def noise(step: int) -> Tensor:
    return normals(SEEDS, INDICES, [step] * len(SEEDS), SHAPE).double()


def our_trajectory(diffusion: GaussianDiffusion, schedule: SamplingSchedule) -> Tensor:
    """Every x after x_T, [S, N, C, H, W]."""
    xs: list[Tensor] = []
    x0s: list[Tensor] = []

    def on_step(i: int, x: Tensor, x0: Tensor) -> None:
        assert i == len(xs) + 1
        xs.append(x)
        x0s.append(x0)

    final = sample(network_of(diffusion), schedule, SHAPE, SEEDS, INDICES, dtype=torch.float64, on_step=on_step)
    assert torch.equal(final, xs[-1])
    limited = torch.stack(x0s).abs() == 1
    assert limited.any(), "nothing was clipped: the comparison says nothing about clipping"
    assert not limited.all(), "everything was clipped: the comparison says nothing else"
    return torch.stack(xs)


def their_trajectory(
    scheduler: Any, diffusion: GaussianDiffusion, step: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> Tensor:
    """The same with `step(out, t, x, z)` of diffusers, at the scheduler's own timesteps."""
    network, x = network_of(diffusion), noise(0)
    xs = []
    for i, t in enumerate(scheduler.timesteps, start=1):
        x = step(network(x, t.expand(len(x)), None), t, x, noise(i))
        xs.append(x)
    return torch.stack(xs)


def in_float64(scheduler: Any, diffusion: GaussianDiffusion) -> Any:
    scheduler.alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)
    return scheduler


KINDS = [(betas, prediction) for betas in ("linear", "cosine") for prediction in ("eps", "x0", "v")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("betas", "prediction", "steps", "spacing"),
    [
        ("linear", "eps", 1000, "trailing"),
        ("cosine", "v", 1000, "trailing"),
        *((*kind, 50, "leading") for kind in KINDS),
        *((*kind, 30, "trailing") for kind in KINDS),
        *((*kind, 7, "linspace") for kind in KINDS),
        *((*kind, 1, "trailing") for kind in KINDS),
    ],
)
def test_ddpm_is_that_of_diffusers(
    betas: str, prediction: str, steps: int, spacing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusion = diffusion_of(betas, prediction)
    schedule = make_schedule(diffusion, "ddpm", steps, spacing=spacing)
    scheduler = DDPMScheduler(
        variance_type="fixed_small", prediction_type=THEIR_NAMES[prediction], timestep_spacing=spacing
    )
    in_float64(scheduler, diffusion)
    if spacing == "linspace":  # diffusers' DDPM has another idea of it
        scheduler.set_timesteps(timesteps=schedule.timesteps.tolist())
    else:
        scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == schedule.timesteps.tolist()

    def step(out: Tensor, t: Tensor, x: Tensor, z: Tensor) -> Tensor:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: z)
        return scheduler.step(out, t, x).prev_sample

    theirs = their_trajectory(scheduler, diffusion, step)
    torch.testing.assert_close(our_trajectory(diffusion, schedule), theirs, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("betas", "prediction"), KINDS)
@pytest.mark.parametrize(
    ("steps", "spacing"),
    # diffusers takes t - T // n for the next timestep: right for leading, and for trailing where n divides T
    [(50, "leading"), (30, "leading"), (7, "leading"), (20, "trailing"), (1, "trailing")],
)
def test_ddim_is_that_of_diffusers(betas: str, prediction: str, steps: int, spacing: str, eta: float) -> None:
    diffusion = diffusion_of(betas, prediction)
    schedule = make_schedule(diffusion, "ddim", steps, eta=eta, spacing=spacing)
    scheduler = in_float64(DDIMScheduler(prediction_type=THEIR_NAMES[prediction], timestep_spacing=spacing), diffusion)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == schedule.timesteps.tolist()

    def step(out: Tensor, t: Tensor, x: Tensor, z: Tensor) -> Tensor:
        answer = scheduler.step(out, t, x, eta=eta, use_clipped_model_output=True, variance_noise=z if eta else None)
        return answer.prev_sample

    theirs = their_trajectory(scheduler, diffusion, step)
    torch.testing.assert_close(our_trajectory(diffusion, schedule), theirs, rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize(
    ("betas", "prediction"), [("linear", "eps"), ("linear", "x0"), ("linear", "v"), ("cosine", "v")]
)
@pytest.mark.parametrize(
    ("steps", "spacing"),
    [(50, "linspace"), (15, "linspace"), (14, "linspace"), (7, "linspace"), (20, "trailing"), (2, "trailing")],
)
@pytest.mark.parametrize(
    ("sampler", "order", "algorithm"),
    [("dpmpp_2m", 2, "dpmsolver++"), ("dpmpp_3m", 3, "dpmsolver++"), ("dpmpp_2m_sde", 2, "sde-dpmsolver++")],
)
def test_dpm_solvers_are_those_of_diffusers(
    sampler: str, order: int, algorithm: str, betas: str, prediction: str, steps: int, spacing: str
) -> None:
    diffusion = diffusion_of(betas, prediction)
    schedule = make_schedule(diffusion, sampler, steps, spacing=spacing)
    scheduler = DPMSolverMultistepScheduler(
        prediction_type=THEIR_NAMES[prediction],
        timestep_spacing=spacing,
        algorithm_type=algorithm,
        solver_order=order,
        solver_type="midpoint",
        final_sigmas_type="zero",
        thresholding=True,  # with the default sample_max_value of 1 it is a clamp
    )
    in_float64(scheduler, diffusion).set_timesteps(steps)
    assert scheduler.timesteps.tolist() == schedule.timesteps.tolist()

    def step(out: Tensor, t: Tensor, x: Tensor, z: Tensor) -> Tensor:
        return scheduler.step(out, t, x, variance_noise=z).prev_sample

    theirs = their_trajectory(scheduler, diffusion, step)  # its sigmas and its x are float32
    torch.testing.assert_close(our_trajectory(diffusion, schedule), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3, 15])
@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_dpmpp_2m_is_the_textbooks(betas: str, steps: int) -> None:
    diffusion = diffusion_of(betas, "v")
    schedule = make_schedule(diffusion, "dpmpp_2m", steps)
    alpha_bars = [*diffusion.alphas_cumprod[schedule.timesteps], 1.0]
    alpha, sigma = np.sqrt(alpha_bars), np.sqrt(1 - np.array(alpha_bars))
    network, x, xs = network_of(diffusion), noise(0), []
    lambdas: list[float] = []
    m: list[Tensor] = []
    for i, t in enumerate(schedule.timesteps):
        m.append((alpha[i] * x - sigma[i] * network(x, torch.tensor([t, t]), None)).clamp(-1, 1))
        lambdas.append(math.log(alpha[i] / sigma[i]))
        if i == steps - 1:
            x = m[i]
        else:
            h = math.log(alpha[i + 1] / sigma[i + 1]) - lambdas[i]
            d = m[i]
            if i > 0:
                r = (lambdas[i] - lambdas[i - 1]) / h
                d = (1 + 1 / (2 * r)) * m[i] - 1 / (2 * r) * m[i - 1]
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (math.exp(-h) - 1) * d
        xs.append(x)
    torch.testing.assert_close(our_trajectory(diffusion, schedule), torch.stack(xs), rtol=0, atol=1e-10)


def error_of(sampler: str, steps: int) -> float:
    """At the end of `steps` steps from log-SNR -3 to 2 (the step after them goes to a clean image)."""
    # Data N(0, ½²): the best x0 is linear in x, and the probability flow keeps x over its standard deviation.
    diffusion = GaussianDiffusion(DiffusionConfig(num_timesteps=100_000))
    ab, log_snr = diffusion.alphas_cumprod, diffusion.log_snr()
    variance = 0.25 * ab + 1 - ab
    t = np.array([np.abs(log_snr - target).argmin() for target in np.linspace(-3, 2, steps + 1)])
    table = {"c": np.zeros(steps + 1), "d": np.zeros(steps + 1)}
    table |= SAMPLERS[sampler](diffusion, t, 0.0, "fixed_small")
    exact = np.sqrt(variance[t])
    x, (x0_prev, x0_prev2) = exact[2], (0.25 * np.sqrt(ab[t]) / exact)[[1, 0]]  # with the exact past
    for i in range(2, steps):
        x0 = 0.25 * math.sqrt(ab[t[i]]) / variance[t[i]] * x
        x = table["a"][i] * x + table["b"][i] * x0 + table["c"][i] * x0_prev + table["d"][i] * x0_prev2
        x0_prev, x0_prev2 = x0, x0_prev
    return float(abs(x - exact[-1]))


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_solvers_have_their_order(sampler: str, order: int) -> None:
    assert math.log2(error_of(sampler, 40) / error_of(sampler, 80)) == pytest.approx(order, abs=0.15)


def test_third_order_converges_faster_than_second() -> None:
    assert error_of("dpmpp_3m", 80) < 0.6 * error_of("dpmpp_2m", 80)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 1000])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_last_row_is_x0_itself(sampler: str, steps: int, spacing: str) -> None:
    schedule = make_schedule(LINEAR, sampler, steps, eta=1.0, spacing=spacing)
    last = dict(zip(COEFFICIENTS, schedule.table[-1], strict=True))
    assert (last["a"], last["b"], last["c"], last["s"]) == (0, 1, 0, 0)
    assert len(schedule) == steps
    assert np.isfinite(schedule.table).all()
    assert schedule.table.dtype == np.float64


def column(schedule: SamplingSchedule, name: str) -> Any:
    return schedule.table[:, COEFFICIENTS.index(name)]


@pytest.mark.parametrize(
    ("spacing", "t", "sigma"),
    [("leading", 500, 0.420265433125), ("trailing", 999, 0.574284350785), ("leading", 20, 0.00992036102998)],
)
def test_ddim_noise_has_the_known_size(spacing: str, t: int, sigma: float) -> None:
    for eta in (1.0, 0.5, 0.0):
        schedule = make_schedule(LINEAR, "ddim", 50, eta=eta, spacing=spacing)
        (found,) = column(schedule, "s")[schedule.timesteps == t]
        assert found == pytest.approx(eta * sigma, rel=1e-10)


@pytest.mark.parametrize(
    ("t", "c1", "c2", "variance"),
    [
        (1, 0.54529149951, 0.454708498991, 5.4531876613e-5),
        (500, 0.00305805707563, 0.994104350757, 0.0100513357789),
        (999, 1.28351487172e-4, 0.989948678268, 0.0199999835266),
    ],
)
def test_ddpm_over_all_timesteps_is_the_known_posterior(t: int, c1: float, c2: float, variance: float) -> None:
    schedule = make_schedule(LINEAR, "ddpm", 1000)
    found = [column(schedule, name)[999 - t] for name in ("b", "a", "s")]
    assert found == pytest.approx([c1, c2, math.sqrt(variance)], rel=1e-9)


@pytest.mark.parametrize("steps", [1000, 37])
def test_ddim_with_eta_1_is_ddpm(steps: int) -> None:
    ours, ddpm = make_schedule(LINEAR, "ddim", steps, eta=1.0), make_schedule(LINEAR, "ddpm", steps)
    np.testing.assert_allclose(ours.table, ddpm.table, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_timesteps", [2, 7, 100, 1000])
def test_timesteps_descend_within_range_for_any_step_count(num_timesteps: int, spacing: str) -> None:
    log_snr = GaussianDiffusion(DiffusionConfig(num_timesteps, "cosine")).log_snr()
    for steps in range(1, num_timesteps + 1):
        timesteps = make_timesteps(num_timesteps, steps, spacing, log_snr)
        assert timesteps.dtype == np.int64
        assert len(timesteps) == steps
        assert (np.diff(timesteps) < 0).all()
        assert timesteps[-1] >= 0
        assert timesteps[-1] == 0 or spacing != "leading"
        assert timesteps[0] < num_timesteps
        assert timesteps[0] == num_timesteps - 1 or spacing == "leading"
    assert make_timesteps(num_timesteps, num_timesteps, spacing, log_snr).tolist() == list(range(num_timesteps))[::-1]


@pytest.mark.parametrize(
    ("spacing", "first", "last"),
    [("leading", [980, 960], [20, 0]), ("trailing", [999, 979], [39, 19]), ("linspace", [999, 979, 959], [40, 20])],
)
def test_fifty_timesteps_of_a_thousand_are_the_known_ones(spacing: str, first: list[int], last: list[int]) -> None:
    timesteps = make_timesteps(1000, 50, spacing).tolist()
    assert timesteps[: len(first)] == first
    assert timesteps[-2:] == last
    assert make_timesteps(1000, 3, "trailing").tolist() == [999, 666, 332]  # thirds of T, rounded, less one


def log_snr(diffusion: GaussianDiffusion, t: int) -> float:
    ab = diffusion.alphas_cumprod[t]
    return 0.5 * math.log(ab / (1 - ab))


def test_eps_without_a_limit_starts_where_x0_can_be_told() -> None:
    fine = DiffusionConfig(num_timesteps=10_000, schedule="cosine")
    eps, v = GaussianDiffusion(fine), GaussianDiffusion(replace(fine, prediction="v"))
    for sampler in SAMPLERS:
        start = int(make_schedule(eps, sampler, 20, limit="none").timesteps[0])
        assert log_snr(eps, start) >= -5.1 > log_snr(eps, start + 1)
        assert make_schedule(eps, sampler, 20).timesteps[0] == 9999
        assert make_schedule(v, sampler, 20, limit="none").timesteps[0] == 9999
    with pytest.raises(ValueError, match=f"between 1 and {start + 1}"):
        make_schedule(eps, "ddim", 10_000, limit="none")


def test_without_a_limit_x0_is_what_the_network_says() -> None:
    x, zero = torch.full((2, 1, 1, 1), 5.0), torch.zeros(2, 1, 1, 1)
    clipped, free = make_schedule(LINEAR, "ddim", 1), make_schedule(LINEAR, "ddim", 1, limit="none")
    rows = torch.tensor(np.concatenate([clipped.table, free.table])).float()
    x_next, x0 = apply_step(x, zero, zero, zero, rows, zero)
    assert x0.flatten().tolist() == pytest.approx([1, 5 / math.sqrt(LINEAR.alphas_cumprod[free.timesteps[0]])])
    assert torch.equal(x_next, x0)


def test_plans_of_any_kind_share_a_step() -> None:
    schedules = [
        make_schedule(LINEAR, "ddpm", 1000),
        make_schedule(LINEAR, "ddim", 20, eta=0.3, guidance_scale=2.0),
        make_schedule(LINEAR, "dpmpp_2m", 15, limit="none"),
        make_schedule(LINEAR, "ddim", 1),
        make_schedule(LINEAR, "dpmpp_3m", 15, limit="dynamic"),
        make_schedule(LINEAR, "dpmpp_2m_sde", 9),
    ]
    rows = torch.tensor(np.stack([schedule.table[len(schedule) // 2] for schedule in schedules])).float()
    generator = torch.Generator().manual_seed(0)
    x, out, x0_prev, x0_prev2, z = torch.randn(5, len(schedules), 3, 5, 7, generator=generator)
    together = apply_step(x, out, x0_prev, x0_prev2, rows, z)
    for i in range(len(schedules)):
        one = slice(i, i + 1)
        alone = apply_step(x[one], out[one], x0_prev[one], x0_prev2[one], rows[one], z[one])
        assert torch.equal(together[0][one], alone[0])
        assert torch.equal(together[1][one], alone[1])


def test_what_no_row_needs_can_be_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    x, out, x0_prev, x0_prev2, z = torch.randn(5, 1, 3, 5, 7, generator=generator)
    for sampler, limit in (("ddpm", "clamp"), ("ddim", "none"), ("dpmpp_2m", "clamp"), ("dpmpp_3m", "clamp")):
        schedule = make_schedule(LINEAR, sampler, 15, limit=limit)
        for row in torch.tensor(schedule.table).float():
            columns = row[[COEFFICIENTS.index(name) for name in "cds"]]
            needed = [part if used else None for part, used in zip((x0_prev, x0_prev2, z), columns, strict=True)]
            found = apply_step(x, out, *needed[:2], row[None], needed[2], clamped=limit == "clamp")
            expected = apply_step(x, out, x0_prev, x0_prev2, row[None], z)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


def test_a_step_is_the_formula_of_its_row() -> None:
    numbers = [1.0, 0.9, 0.4, 1.0, 0.5, 0.6, 0.7, 0.3, 0.2, 0.8]
    _, p, q, _, a, b, c, d, k, s = row = torch.tensor(numbers, dtype=torch.float64)
    x, out, v, x0_prev, x0_prev2, z = torch.randn(6, 1, 2, 3, 3, dtype=torch.float64)
    x0 = torch.clamp(p * x - q * out, -1, 1)
    rest = a * x + b * x0 + c * x0_prev + d * x0_prev2
    found = apply_step(x, out, x0_prev, x0_prev2, row[None], z)
    torch.testing.assert_close(found, (rest + s * z, x0))
    found = apply_step(x, torch.cat([out, v], dim=1), x0_prev, x0_prev2, row[None], z)
    torch.testing.assert_close(found, (rest + s * torch.exp(k * v) * z, x0))


def test_guidance_is_two_calls_in_one(tiny: UNet) -> None:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y, g = torch.tensor([9, 99, 500, 999]), torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.5, 0.0, -1.0])
    calls = []

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        calls.append(len(x))
        return tiny(x, t, y)

    guided = cfg_forward(network, x, t, y, g, null_class=3)
    assert calls == [7]
    e, u = tiny(x, t, y), tiny(x, t, torch.full_like(y, 3))
    torch.testing.assert_close(guided, u + g.reshape(-1, 1, 1, 1) * (e - u), rtol=1e-4, atol=1e-5)
    assert (guided - e)[1:3].abs().max() > 1e-4
    assert torch.equal(cfg_forward(network, x, t, y, torch.ones(4), null_class=None), e)
    assert calls == [7, 4]


def test_a_schedule_says_how_many_rows_a_step_takes() -> None:
    assert make_schedule(LINEAR, "ddpm", 3).nfe.tolist() == [1, 1, 1]
    for scale in (0.0, 1.5):
        assert make_schedule(LINEAR, "ddpm", 3, guidance_scale=scale).nfe.tolist() == [2, 2, 2]


def test_guidance_works_under_autocast(tiny: UNet) -> None:
    schedule = make_schedule(
        diffusion_of("cosine", "v"), "ddim", 3, guidance_scale=2.0, limit="none"
    )  # a limit hides errors
    arguments: dict[str, Any] = {"classes": [0, 1], "null_class": 3}
    exact = sample(tiny, schedule, (1, 8, 8), SEEDS, INDICES, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        images = sample(tiny, schedule, (1, 8, 8), SEEDS, INDICES, **arguments)
    assert images.dtype == torch.float32
    assert 0 < (images - exact).abs().max() < 0.1 * exact.std()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_has_no_hidden_state(sampler: str, tiny: UNet) -> None:
    schedule = make_schedule(LINEAR, sampler, 5, eta=1.0, guidance_scale=1.5)

    def run() -> Tensor:
        return sample(tiny, schedule, (1, 8, 8), SEEDS, INDICES, [0, 1], null_class=3)

    table = schedule.table.copy()
    state = torch.get_rng_state()
    first = run()
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(run(), first)
    assert np.array_equal(schedule.table, table)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch(sampler: str) -> None:
    schedule = make_schedule(LINEAR, sampler, 10, eta=1.0)
    network = network_of(LINEAR)  # element by element, so that equality is to the byte
    together = sample(network, schedule, SHAPE, [1, 2, 1], [0, 0, 1], dtype=torch.float64)
    alone = [sample(network, schedule, SHAPE, [s], [i], dtype=torch.float64) for s, i in ((1, 0), (2, 0), (1, 1))]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[2])


def test_the_network_sees_timestep_and_class_of_every_row() -> None:
    schedule, seen = make_schedule(LINEAR, "ddpm", 4), []

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        seen.append((t.tolist(), y.tolist()))
        return x

    sample(network, schedule, SHAPE, SEEDS, INDICES, classes=[4, 2])
    assert seen == [([t, t], [4, 2]) for t in (999, 749, 499, 249)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"sampler": "euler"},
            "sampler must be one of ddpm, ddim, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, consistency, fitted, not 'euler'",
        ),
        ({"steps": 0}, "steps must be between 1 and 1000, not 0"),
        ({"steps": 1001}, "steps must be between 1 and 1000, not 1001"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"eta": -0.1}, "eta must be between 0 and 1"),
        ({"eta": 1.1}, "eta must be between 0 and 1"),
        ({"eta": math.nan}, "eta must be between 0 and 1"),
        ({"spacing": "even"}, "spacing must be one of leading, trailing, linspace, quadratic, logsnr"),
        ({"limit": "soft"}, "limit must be one of none, clamp, dynamic"),
        ({"variance": "large"}, "variance must be one of"),
        ({"variance": "learned_range"}, "learned_range needs a network"),
        ({"sampler": "ddpm", "variance": "fixed_large"}, "needs all 1000 steps"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.0, 1.1)}, "guidance_interval"),
        ({"guidance_interval": (-0.1, 1.0)}, "guidance_interval"),
        ({"guidance_scale": math.inf}, "guidance_scale must be finite"),
        ({"guidance_scale": math.nan}, "guidance_scale must be finite"),
    ],
    ids=str,
)
def test_a_schedule_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_schedule(LINEAR, **({"sampler": "ddim", "steps": 10} | arguments))


@pytest.mark.slow
def test_fixed_large_matches_diffusers_and_needs_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(variance="fixed_large"))
    schedule = make_schedule(diffusion, "ddpm", 1000)
    scheduler = in_float64(DDPMScheduler(variance_type="fixed_large"), diffusion)
    scheduler.set_timesteps(1000)

    def step(out: Tensor, t: Tensor, x: Tensor, z: Tensor) -> Tensor:
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *args, **kwargs: z)
        return scheduler.step(out, t, x).prev_sample

    theirs = their_trajectory(scheduler, diffusion, step)
    torch.testing.assert_close(our_trajectory(diffusion, schedule), theirs, rtol=0, atol=1e-8)
    with pytest.warns(UserWarning, match="fixed_small is used"):
        few = make_schedule(diffusion, "ddpm", 50)
    assert np.array_equal(few.table, make_schedule(LINEAR, "ddpm", 50).table)
    make_schedule(diffusion, "ddim", 50)


LEARNED = GaussianDiffusion(DiffusionConfig(variance="learned_range"))


@pytest.mark.parametrize("steps", [1000, 37])
def test_learned_variance_lies_between_the_fixed_ones(steps: int) -> None:
    schedule = make_schedule(LEARNED, "ddpm", steps)
    ab = LEARNED.alphas_cumprod[schedule.timesteps]
    ab_prev = np.append(ab[1:], 1.0)
    beta = 1 - ab / ab_prev
    small = beta * (1 - ab_prev) / (1 - ab)
    for v in (-1.0, -0.3, 1.0):
        fraction = (v + 1) / 2
        expected = np.exp(0.5 * (fraction * np.log(beta[:-1]) + (1 - fraction) * np.log(small[:-1])))
        found = column(schedule, "s") * np.exp(column(schedule, "k") * v)
        np.testing.assert_allclose(found[:-1], expected, rtol=1e-10)
        assert found[-1] == 0


def test_guidance_leaves_a_learned_variance_alone() -> None:
    x, y = torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])

    def network(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return (y + 1.0).reshape(-1, 1, 1, 1) * torch.ones(1, 2, 2, 2)

    out = cfg_forward(network, x, y, y, torch.tensor([3.0, 1.0]), null_class=9)
    assert out[:, :, 0, 0].tolist() == [[10 + 3 * (1 - 10), 1.0], [2.0, 2.0]]


def test_guidance_acts_and_costs_rows_only_in_its_interval() -> None:
    schedule = make_schedule(LINEAR, "ddim", 10, guidance_scale=3.0, guidance_interval=(0.25, 0.75))
    inside = (schedule.timesteps / 999 >= 0.25) & (schedule.timesteps / 999 <= 0.75)
    assert 0 < inside.sum() < 10
    assert np.array_equal(column(schedule, "g"), np.where(inside, 3.0, 1.0))
    assert np.array_equal(schedule.nfe, np.where(inside, 2, 1))


def test_the_guidance_interval_includes_its_ends() -> None:
    schedule = make_schedule(LINEAR, "ddpm", 1000, guidance_scale=3.0, guidance_interval=(250 / 999, 750 / 999))
    assert schedule.timesteps[column(schedule, "g") == 3].tolist() == list(range(750, 249, -1))
    fine = GaussianDiffusion(DiffusionConfig(10_000, "cosine"))
    steps = int((fine.log_snr() >= -5.1).sum())  # without a limit the others are not visited, but are there
    schedule = make_schedule(fine, "ddim", steps, limit="none", guidance_scale=3.0, guidance_interval=(0.5, 1.0))
    assert schedule.timesteps[column(schedule, "g") == 3].min() == 5000


def test_a_dynamic_limit_scales_each_image_by_its_own_quantile() -> None:
    rows = torch.tensor(make_schedule(LINEAR, "ddim", 1, limit="dynamic").table).expand(2, -1).clone()
    rows[:, [COEFFICIENTS.index("p"), COEFFICIENTS.index("q")]] = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x * torch.tensor([3.0, 0.2]).reshape(2, 1, 1, 1)
    zero = torch.zeros_like(x)
    _, x0 = apply_step(x, zero, zero, zero, rows, zero)
    s = np.quantile(x[0].abs().numpy(), 0.995)
    np.testing.assert_allclose(x0[0].numpy(), np.clip(x[0].numpy(), -s, s) / s, rtol=1e-12)
    assert torch.equal(x0[1], x[1])


def test_logsnr_and_quadratic_spacings_are_as_defined() -> None:
    log_snr = LINEAR.log_snr()
    timesteps = make_schedule(LINEAR, "ddim", 20, spacing="logsnr").timesteps
    assert timesteps[[0, -1]].tolist() == [999, 0]
    gaps = np.diff(log_snr[timesteps])
    assert np.abs(gaps[:12] / gaps[:12].mean() - 1).max() < 0.05
    assert make_timesteps(1000, 5, "quadratic").tolist() == [999, 639, 360, 160, 40]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_zero_terminal_snr_starts_at_pure_noise(sampler: str, prediction: str) -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction=prediction, zero_terminal_snr=True))
    for steps in (1, 2, 3, 5, 17):  # with 17 ddim's variance is all there is, and a rounding error more
        schedule = make_schedule(diffusion, sampler, steps, eta=1.0)
        assert np.isfinite(schedule.table).all()
        images = sample(lambda x, t, y: 0.3 * x, schedule, SHAPE, SEEDS, INDICES, dtype=torch.float64)
        assert torch.isfinite(images).all()


def test_overrides_win_and_defaults_belong_to_their_sampler() -> None:
    own = SamplingParams("ddim", 30, 0.4, 2.0, (0.1, 0.7), "quadratic", "dynamic")
    assert own.with_overrides(1000) == own.with_overrides(1000, sampler="ddim") == own
    asked: dict[str, Any] = {
        "sampler": "ddim",
        "steps": 7,
        "eta": 0.2,
        "guidance_scale": 3.0,
        "guidance_interval": (0.2, 0.3),
        "spacing": "logsnr",
        "limit": "none",
    }
    assert own.with_overrides(1000, **asked) == SamplingParams(**asked)
    for sampler, steps in DEFAULT_STEPS.items():
        other = own.with_overrides(40, sampler=sampler)
        if sampler != "ddim":
            assert other == replace(own, sampler=sampler, steps=min(steps, 40), eta=0.0, spacing="trailing")
    assert own.with_overrides(1000, guidance_scale=1.0).guidance_interval == (0, 1)
    assert own.with_overrides(1000, guidance_scale=1.0, guidance_interval=(0.0, 1.0)).guidance_scale == 1
    for contradiction in (
        {"sampler": "ddpm", "eta": 0.5},
        {"guidance_scale": 1.0, "guidance_interval": (0.0, 0.5)},
    ):
        with pytest.raises(InvalidSamplingParams) as caught:
            own.with_overrides(1000, **contradiction)
        assert str(caught.value).startswith(caught.value.field)
        assert caught.value.field in contradiction
    assert DEFAULT_STEPS.keys() == SAMPLERS.keys()


def test_zero_terminal_snr_needs_a_spacing_from_pure_noise() -> None:
    diffusion = GaussianDiffusion(DiffusionConfig(prediction="v", zero_terminal_snr=True))
    for spacing in SPACINGS:
        if spacing == "leading":
            with pytest.raises(
                InvalidSamplingParams, match="spacing leading starts at timestep 980: zero terminal SNR"
            ):
                make_schedule(diffusion, "ddim", 50, spacing=spacing)
        else:
            assert make_schedule(diffusion, "ddim", 50, spacing=spacing).timesteps[0] == 999
    make_schedule(diffusion, "ddim", 1000, spacing="leading")
