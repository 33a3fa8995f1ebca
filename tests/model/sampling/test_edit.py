"""Edits in the naive loop: where they begin, against diffusers and the formula, and what they keep."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.images import from_uint8, to_uint8
from model.sampling.edit import Edit, keep, start_from
from model.sampling.noise import normals
from model.sampling.schedule import COEFFICIENTS, InvalidSamplingParams, make_schedule
from model.sampling.solvers import SAMPLERS
from model.sampling.step import apply_step, sample
from model.sigmas import Sigmas
from tests.model.sampling.test_solvers import INDICES, SEEDS, SHAPE, diffusion_of, network_of

LINEAR = GaussianDiffusion(DiffusionConfig())
IMAGE = torch.linspace(-1, 1, 16, dtype=torch.float64).reshape(SHAPE)
LEFT = (torch.arange(4) >= 2).double().expand(1, 4, 4)  # 0 in the left half, which stays


def run(sampler: str, steps: int, edit: Edit | None, diffusion: GaussianDiffusion = LINEAR, **settings: Any) -> Tensor:
    schedule = make_schedule(diffusion, sampler, steps, **settings)
    return sample(network_of(diffusion), schedule, SHAPE, SEEDS, INDICES, edit=edit, dtype=torch.float64)


@pytest.mark.parametrize(
    ("strength", "steps", "first"),
    [(1.0, 4, 999), (0.9, 4, 999), (0.75, 4, 749), (0.6, 4, 499), (0.01, 4, 249), (0.5, 1000, 500), (0.6, 50, 599)],
)
def test_strength_says_at_which_timestep_it_begins(strength: float, steps: int, first: int) -> None:
    whole, begun = (make_schedule(LINEAR, "ddim", steps, strength=some) for some in (1.0, strength))
    assert begun.timesteps[0] == first
    assert begun.timesteps.tolist() == whole.timesteps[len(whole) - len(begun) :].tolist()
    assert int(begun.nfe.sum()) == len(begun)


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan")])
def test_a_strength_out_of_bounds_is_refused(strength: float) -> None:
    with pytest.raises(InvalidSamplingParams, match="strength must be above 0 and at most 1"):
        make_schedule(LINEAR, "ddim", 4, strength=strength)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_it_begins_with_the_reference_noised_by_the_seed(sampler: str) -> None:
    seen: list[Tensor] = []
    network = network_of(LINEAR)

    def watched(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        seen.append(x)
        return network(x, t, y)

    schedule = make_schedule(LINEAR, sampler, 10, strength=0.6)
    sample(watched, schedule, SHAPE, SEEDS, INDICES, edit=Edit(IMAGE), dtype=torch.float64)
    noise = normals(SEEDS, INDICES, [0, 0], SHAPE).double()
    alpha_bar = LINEAR.alphas_cumprod[599]
    assert len(seen) == 6
    torch.testing.assert_close(seen[0], np.sqrt(alpha_bar) * IMAGE + np.sqrt(1 - alpha_bar) * noise)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
@pytest.mark.parametrize(
    ("sampler", "kind"),
    [
        ("ddim", {}),
        ("dpmpp_2m", {"algorithm_type": "dpmsolver++"}),
        ("dpmpp_3m", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
        ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_image_to_image_is_that_of_diffusers(sampler: str, kind: dict[str, Any]) -> None:
    diffusion, steps = diffusion_of("linear", "v"), 10
    spacing = "trailing" if sampler == "ddim" else "linspace"
    same = {"prediction_type": "v_prediction", "timestep_spacing": spacing}
    if sampler == "ddim":
        scheduler: Any = DDIMScheduler(**same)
    else:
        scheduler = DPMSolverMultistepScheduler(**same, **kind, final_sigmas_type="zero", thresholding=True)
    scheduler.alphas_cumprod = torch.from_numpy(diffusion.alphas_cumprod)
    scheduler.set_timesteps(steps)
    schedule, network = make_schedule(diffusion, sampler, steps, spacing=spacing, strength=0.7), network_of(diffusion)
    skipped = steps - len(schedule)
    assert skipped == 3
    timesteps = scheduler.timesteps[skipped:]
    noises = [normals(SEEDS, INDICES, [i, i], SHAPE).double() for i in range(len(schedule) + 1)]
    x = scheduler.add_noise(IMAGE.expand(2, *SHAPE), noises[0], timesteps[:1].expand(2))
    if sampler != "ddim":
        scheduler.set_begin_index(skipped)
    for t, z in zip(timesteps, noises[1:], strict=True):
        extra = {"use_clipped_model_output": True} if sampler == "ddim" else {"variance_noise": z}
        x = scheduler.step(network(x, t.expand(2), None), t, x, **extra).prev_sample
    ours = sample(network, schedule, SHAPE, SEEDS, INDICES, edit=Edit(IMAGE), dtype=torch.float64)
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_solvers_start_afresh_where_the_schedule_begins(sampler: str) -> None:
    schedule = make_schedule(LINEAR, sampler, 20, strength=0.5)
    afresh = SAMPLERS[sampler](LINEAR, schedule.timesteps, 0.0, "fixed_small")
    for name, column in afresh.items():
        assert schedule.table[:, COEFFICIENTS.index(name)].tolist() == column.tolist(), name
    first = dict(zip(COEFFICIENTS, schedule.table[0], strict=True))
    assert (first["c"], first["d"]) == (0, 0), "there is no x0 before the first step"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_the_mask_keeps_comes_out_as_it_was(sampler: str, strength: float) -> None:
    known = from_uint8(torch.arange(0, 256, 16, dtype=torch.uint8).reshape(SHAPE)).double()
    made = run(sampler, 6, Edit(known, LEFT), strength=strength)
    assert torch.equal(made[:, :, :, :2], known[:, :, :2].expand(2, 1, 4, 2))
    assert torch.equal(to_uint8(made)[:, :, :, :2], to_uint8(known)[:, :, :2].expand(2, 1, 4, 2))
    assert (made - known)[:, :, :, 2:].abs().min() > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("limit", ["clamp", "dynamic"])
def test_the_known_part_is_put_back_at_every_step(sampler: str, limit: str) -> None:
    schedule, x0s = make_schedule(LINEAR, sampler, 6, limit=limit), []
    network = network_of(LINEAR)
    sample(
        network,
        schedule,
        SHAPE,
        SEEDS,
        INDICES,
        edit=Edit(IMAGE, LEFT),
        dtype=torch.float64,
        on_step=lambda i, x, x0: x0s.append(x0),
    )
    assert len(x0s) == 6
    assert all(torch.equal(x0[:, :, :, :2], IMAGE[:, :, :2].expand(2, 1, 4, 2)) for x0 in x0s)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_edit_of_everything_is_a_new_image(sampler: str) -> None:
    everything = Edit(IMAGE, torch.ones(1, 4, 4, dtype=torch.float64))
    for edit in (everything, Edit(IMAGE)):
        assert torch.equal(run(sampler, 6, edit), run(sampler, 6, None))
    assert not torch.equal(run(sampler, 6, everything, strength=0.8), run(sampler, 6, None, strength=0.8))


def test_less_strength_stays_nearer_to_the_reference() -> None:
    diffusion = diffusion_of("cosine", "v")
    distances = [
        float((run("ddim", 50, Edit(IMAGE), diffusion, strength=strength) - IMAGE).norm())
        for strength in (0.05, 0.3, 0.6, 1.0)
    ]
    assert distances == sorted(distances)


def test_a_soft_mask_mixes() -> None:
    x0, image = torch.tensor([0.5, -1.0]).reshape(2, 1, 1, 1), torch.ones(2, 1, 1, 1)
    mixed = keep(x0, image, torch.tensor([0.25, 1.0]).reshape(2, 1, 1, 1))
    assert mixed.flatten().tolist() == [0.25 * 0.5 + 0.75, -1.0]


def test_a_row_that_keeps_nothing_is_left_alone_to_the_bit() -> None:
    schedule = make_schedule(LINEAR, "dpmpp_2m", 8)
    rows = torch.tensor(schedule.table[3:5]).float()
    x, out, x0_prev, x0_prev2, z, image = torch.randn(6, 2, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    mask = torch.stack([torch.ones(1, 5, 7), torch.zeros(1, 5, 7)])
    plain = apply_step(x, out, x0_prev, x0_prev2, rows, z)
    edited = apply_step(x, out, x0_prev, x0_prev2, rows, z, True, (image, mask))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(plain, edited, strict=True))
    assert torch.equal(edited[1][1], image[1])


def test_levels_of_noise_begin_midway_too() -> None:
    """x of these networks is c_in·(image + σ·z) (Karras et al. 2022, eq. 7)."""
    sigmas = Sigmas()
    diffusion = GaussianDiffusion(DiffusionConfig(schedule="karras", prediction="edm", sigmas=sigmas))
    whole, begun = (make_schedule(diffusion, "dpmpp_2m", 10, strength=strength) for strength in (1.0, 0.5))
    sigma = float(sigmas.levels(10)[5])  # of 0 … 9, the noisier of those nearest to the middle
    assert len(begun) == 6
    assert begun.timesteps.tolist() == whole.timesteps[4:].tolist()
    scale = math.sqrt(sigma**2 + sigmas.sigma_data**2)
    assert begun.start == pytest.approx((1 / scale, sigma / scale), rel=1e-6)
    assert begun.table[-1].tolist() == pytest.approx(whole.table[-1].tolist())


def test_levels_of_noise_begin_at_sigma_max() -> None:
    """Of noise alone, x is c_in·σ_max·z, and so is x_T that is given; elsewhere it is z itself."""
    config = DiffusionConfig(schedule="karras", prediction="edm", sigmas=Sigmas(sigma_max=1.0))
    levels, z = make_schedule(GaussianDiffusion(config), "ddim", 5), torch.randn(1, 3, 4, 4)
    scale = 1 / math.sqrt(1 + 0.5**2)
    torch.testing.assert_close(start_from(None, z, levels), scale * z)
    torch.testing.assert_close(start_from(torch.zeros_like(z), z, levels), scale * z)
    torch.testing.assert_close(start_from(z, 0 * z, levels.from_latents()), scale * z)
    assert start_from(None, z, make_schedule(LINEAR, "ddim", 5)) is z
    assert levels.digest() != replace(levels, start=(0.0, 1.0)).digest()
