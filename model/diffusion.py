"""The forward process and its loss (Ho et al. 2020): beta schedules, q(x_t | x_0), what the network predicts.

t runs from 0 (almost clean) to T - 1 (almost noise). All tables are float64, cast where they meet images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from model.gaussians import discretised_log_likelihood, normal_kl
from model.sigmas import Sigmas

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [N, C, H, W], t [N], y [N] or None) → prediction [N, C, H, W], or [N, 2C, H, W] with learned variance."""

Table = NDArray[np.float64]

MIN_SNR_GAMMA = 5.0
MIN_ALPHA_BAR = 1e-30  # of trained betas: float32 has the numbers of samplers then


def linear_betas(num_timesteps: int, low: float = 1e-4, high: float = 0.02) -> Table:
    """Ho et al.'s linear betas, float64 [T], scaled by 1000 / T so that fewer timesteps end at the same noise."""
    scale = 1000 / num_timesteps
    return np.linspace(low * scale, high * scale, num_timesteps, dtype=np.float64)


def cosine_betas(num_timesteps: int) -> Table:
    """Nichol & Dhariwal 2021, eq. 17: ᾱ(u) = cos²((u + 0.008)/1.008 · π/2), betas clipped at 0.999. float64 [T]."""
    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: Table = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return betas


def sigmoid_betas(num_timesteps: int) -> Table:
    """Jabri et al. 2022, appendix B, from -3 to 3 with temperature 1, betas clipped at 0.999. float64 [T].

    The end is rounded to float32, as in lucidrains' code, whose default it is.
    """
    u = torch.linspace(0, num_timesteps, num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = (torch.tensor(3.0).sigmoid() - (6 * u - 3).sigmoid()).numpy()  # but for the scale, as below
    betas: Table = np.clip(1 - alpha_bar[1:] / alpha_bar[:-1], 0, 0.999)
    return betas


def rescaled_to_zero_terminal_snr(betas: Table) -> Table:
    """Betas [T] that end at pure noise, ᾱ = 0, with the first as it was (Lin et al. 2023, algorithm 1)."""
    alpha = np.sqrt(np.cumprod(1 - betas))
    alpha_bar = (alpha - alpha[-1]) ** 2  # but for the scale, which ratios do not have
    return np.append(betas[0], 1 - alpha_bar[1:] / alpha_bar[:-1])


@dataclass(frozen=True)
class DiffusionConfig:
    """Everything that fixes the forward process, the meaning of the network's output, and the loss.

    `variance` is that of p(x_{t-1} | x_t): the posterior's (fixed_small), β_t (fixed_large), or between the two, as the
    network says (learned_range, Nichol & Dhariwal 2021, eq. 15). `weighting` is that of each timestep in the loss.
    The schedule trained has its betas in `trained_betas`, as imported networks may; the others compute them. The
    schedule karras has levels of noise, `sigmas`, and networks of EDM; those are sampled, and not trained.
    """

    num_timesteps: int = 1000
    schedule: str = "linear"  # linear, cosine, sigmoid, trained, karras
    schedule_low: float = 1e-4
    schedule_high: float = 0.02
    prediction: str = "eps"  # eps, x0, v; of karras: edm, consistency
    loss_type: str = "l2"  # l1, l2, huber
    variance: str = "fixed_small"  # fixed_small, fixed_large, learned_range
    weighting: str = "none"  # none, min_snr, p2
    zero_terminal_snr: bool = False
    trained_betas: tuple[float, ...] = ()  # T of them where the schedule is trained, none where it is not
    sigmas: Sigmas | None = None  # of karras

    def __post_init__(self) -> None:
        object.__setattr__(self, "trained_betas", tuple(self.trained_betas))  # JSON has lists only
        object.__setattr__(self, "sigmas", Sigmas.of(self.sigmas))
        is_karras = self.sigmas is not None
        for name, value, valid in (
            ("schedule", self.schedule, (KARRAS,) if is_karras else (*SCHEDULES, TRAINED)),
            ("prediction", self.prediction, PRECONDITIONED if is_karras else PREDICTIONS),
            ("loss_type", self.loss_type, LOSSES),
            ("variance", self.variance, VARIANCES),
            ("weighting", self.weighting, WEIGHTINGS),
        ):
            require_one_of(name, value, valid)
        if not isinstance(self.num_timesteps, int) or not 2 <= self.num_timesteps <= 100_000:
            raise ValueError(f"num_timesteps must be a whole number from 2 to 100000, not {self.num_timesteps}")
        if self.zero_terminal_snr and self.prediction in ("eps", *PRECONDITIONED):
            raise ValueError(
                "zero_terminal_snr needs prediction x0 or v: at pure noise eps says nothing about the image"
            )
        if self.schedule == TRAINED:
            self._check_trained_betas()
        elif self.trained_betas:
            raise ValueError(f"trained_betas need the schedule {TRAINED}, not {self.schedule}")
        betas = self._plain_betas()
        if not (np.all(betas > 0) and np.all(betas < 1)):
            raise ValueError(
                f"these settings give betas outside (0, 1): {betas.min():.3g} to {betas.max():.3g}; "
                "with few timesteps the linear schedule needs smaller schedule_low and schedule_high"
            )

    def _check_trained_betas(self) -> None:
        if len(self.trained_betas) != self.num_timesteps:
            raise ValueError(f"{len(self.trained_betas)} trained_betas for {self.num_timesteps} timesteps")
        if wrong := [beta for beta in self.trained_betas if not isinstance(beta, float) or not 0 < beta < 1]:
            raise ValueError(f"trained_betas must be numbers between 0 and 1, not {wrong[0]!r:.40}")
        if (left := np.prod(1 - np.array(self.trained_betas))) < MIN_ALPHA_BAR:
            raise ValueError(f"trained_betas leave {left:.3g} of the image's variance, under {MIN_ALPHA_BAR:g}")

    def _plain_betas(self) -> Table:
        if self.sigmas is not None:
            return self.sigmas.betas(self.num_timesteps)
        if self.schedule == TRAINED:
            return np.array(self.trained_betas, dtype=np.float64)
        return SCHEDULES[self.schedule](self)

    def betas(self) -> Table:
        """β_t, float64 [T]."""
        betas = self._plain_betas()
        return rescaled_to_zero_terminal_snr(betas) if self.zero_terminal_snr else betas


TRAINED, KARRAS = "trained", "karras"
SCHEDULES: dict[str, Callable[[DiffusionConfig], Table]] = {  # that are computed
    "linear": lambda c: linear_betas(c.num_timesteps, c.schedule_low, c.schedule_high),
    "cosine": lambda c: cosine_betas(c.num_timesteps),
    "sigmoid": lambda c: sigmoid_betas(c.num_timesteps),
}
PREDICTIONS = ("eps", "x0", "v")
PRECONDITIONED = ("edm", "consistency")
VARIANCES = ("fixed_small", "fixed_large", "learned_range")
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of each element
    "l1": partial(F.l1_loss, reduction="none"),
    "l2": partial(F.mse_loss, reduction="none"),
    "huber": partial(F.huber_loss, reduction="none"),  # quadratic up to a difference of 1
}
WEIGHTINGS: dict[str, Callable[[Table], Table]] = {  # ε-loss weight, times SNR, so that SNR 0 is no special case
    "min_snr": lambda snr: np.minimum(snr, MIN_SNR_GAMMA),  # Hang et al. 2023, eq. 5
    "p2": lambda snr: snr / (1 + snr),  # Choi et al. 2022, eq. 8, k = γ = 1
    "none": lambda snr: snr,  # not called: no loss is weighted, whatever is predicted
}


class GaussianDiffusion:
    """q(x_t | x_0) = N(√ᾱ_t·x_0, (1 - ᾱ_t)·I), and the loss of a network that undoes it.

    The tables are float64 numpy arrays [T]: `betas`, `alphas_cumprod` (ᾱ), and of q(x_{t-1} | x_t, x_0), Ho et al.'s
    eq. 7, `posterior_x0` and `posterior_xt` (the coefficients of its mean), `posterior_variance` and
    `posterior_log_variance`, whose entry 0 is entry 1's: the variance is 0 there. Methods take image tensors
    [N, C, H, W] in [-1, 1] and timesteps t, int64 [N].
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self.betas = config.betas()
        self.alphas_cumprod = np.cumprod(1 - self.betas, dtype=np.float64)
        previous = np.append(1.0, self.alphas_cumprod[:-1])
        self.posterior_x0 = self.betas * np.sqrt(previous) / (1 - self.alphas_cumprod)
        self.posterior_xt = (1 - previous) * np.sqrt(1 - self.betas) / (1 - self.alphas_cumprod)
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alphas_cumprod)
        self.posterior_log_variance = np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))
        # β_t; entry 0, which only a likelihood meets, is the posterior's, as in Ho et al.'s code
        self.large_log_variance = np.log(np.append(self.posterior_variance[1], self.betas[1:]))
        self._tables = {
            name: torch.from_numpy(table)
            for name, table in {
                "alpha": np.sqrt(self.alphas_cumprod),
                "sigma": np.sqrt(1 - self.alphas_cumprod),
                "posterior_x0": self.posterior_x0,
                "posterior_xt": self.posterior_xt,
                "posterior_log_variance": self.posterior_log_variance,
                "large_log_variance": self.large_log_variance,
                "log_beta": np.log(self.betas),
                "weight": self.loss_weights(),
            }.items()
        }

    def to(self, device: torch.device | str) -> GaussianDiffusion:
        """Moves the tables that meet images to `device`, so that a training step copies nothing."""
        self._tables = {name: table.to(device) for name, table in self._tables.items()}
        return self

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """A table at t, [N, 1, 1, 1] in the type of `like`."""
        return self._tables[name][t].to(like.dtype).reshape(-1, 1, 1, 1)

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), each [N, 1, 1, 1] in the type of `like`."""
        return self._at("alpha", t, like), self._at("sigma", t, like)

    def log_snr(self) -> Table:
        """log(√ᾱ / √(1 - ᾱ)), float64 [T]; -∞ at the end with zero terminal SNR."""
        with np.errstate(divide="ignore"):
            log_snr: Table = 0.5 * np.log(self.alphas_cumprod / (1 - self.alphas_cumprod))
        return log_snr

    def loss_weights(self) -> Table:
        """The weight of each timestep's loss, float64 [T].

        min_snr and p2 weight the loss of ε. The same error counts SNR⁻¹ and (SNR + 1)/SNR as much in x_0 and v, so
        min_snr is min(SNR, 5) over SNR for ε, over 1 for x_0, over SNR + 1 for v (Hang et al. 2023, §3.4).
        """
        if self.config.weighting == "none":
            return np.ones(self.num_timesteps)
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        of_eps = {"eps": snr, "x0": np.ones_like(snr), "v": snr + 1}[self.config.prediction]
        weights: Table = WEIGHTINGS[self.config.weighting](snr) / of_eps
        return weights

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1 - ᾱ_t)·ε (Ho et al., eq. 4)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should have said: ε, x_0, or v = √ᾱ·ε - √(1 - ᾱ)·x_0 (Salimans & Ho 2022)."""
        self._check_timesteps()
        if self.config.prediction == "eps":
            return noise
        if self.config.prediction == "x0":
            return x0
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * noise - sigma * x0

    def loss(self, network: Network, x0: Tensor, y: Tensor | None, t: Tensor, noise: Tensor) -> Tensor:
        """The training loss of each image, float32 [N] (Ho et al., eq. 14, for l2 and eps).

        With learned variance T/1000 of the variational bound's term is added, in bits per dimension, whose gradient
        does not reach the mean (Nichol & Dhariwal 2021, eq. 16, as in their code).
        """
        xt = self.q_sample(x0, t, noise)
        out = network(xt, t, y).float()
        v = None
        if self.config.variance == "learned_range":
            out, v = out.chunk(2, dim=1)
        distance = LOSSES[self.config.loss_type](out, self.target(x0, t, noise).float()).mean(dim=(1, 2, 3))
        loss = distance * self._tables["weight"][t].to(distance.dtype)
        if v is not None:
            bound = self.vb_term_bpd(x0, xt, t, torch.cat([out.detach(), v], dim=1))
            loss = loss + self.num_timesteps / 1000 * bound
        return loss

    def predicted_x0(self, out: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """x_0 from the network's output [N, C, H, W], whatever it predicts."""
        self._check_timesteps()
        alpha, sigma = self.alpha_sigma(t, xt)
        if self.config.prediction == "eps":
            return (xt - sigma * out) / alpha
        return out if self.config.prediction == "x0" else alpha * xt - sigma * out

    def p_mean_log_variance(self, out: Tensor, xt: Tensor, t: Tensor, clip: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t), [N, C, H, W] each. `clip` limits x_0 to [-1, 1] first.

        out is [N, 2C, H, W] with learned variance, whose second half v says where between log β̃ (-1) and log β (1)
        the log variance lies (Nichol & Dhariwal 2021, eq. 15).
        """
        low = self._at("posterior_log_variance", t, xt)
        if self.config.variance == "learned_range":
            out, v = out.chunk(2, dim=1)
            high = self._at("log_beta", t, xt)
            log_variance = low + (v + 1) / 2 * (high - low)
        elif self.config.variance == "fixed_large":
            log_variance = self._at("large_log_variance", t, xt).expand_as(xt)
        else:
            log_variance = low.expand_as(xt)
        x0 = self.predicted_x0(out, xt, t)
        return self.q_mean(x0.clamp(-1, 1) if clip else x0, xt, t), log_variance

    def _check_timesteps(self) -> None:
        if self.config.sigmas is not None:
            raise ValueError("a network of EDM's levels of noise is sampled here, not trained, and has no likelihood")

    def q_mean(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """The mean of q(x_{t-1} | x_t, x_0) (Ho et al., eq. 7)."""
        return self._at("posterior_x0", t, xt) * x0 + self._at("posterior_xt", t, xt) * xt

    def vb_term_bpd(self, x0: Tensor, xt: Tensor, t: Tensor, out: Tensor, clip: bool = False) -> Tensor:
        """The variational bound's term at t, in bits per dimension, [N] (Ho et al., eq. 5, L_{t-1} and L_0).

        t > 0: KL(q(x_{t-1} | x_t, x_0) ‖ p(x_{t-1} | x_t)); t = 0: -log p(x_0 | x_1) of the discretised Gaussian.
        """
        mean, log_variance = self.p_mean_log_variance(out, xt, t, clip)
        low = self._at("posterior_log_variance", t, xt)
        divergence = normal_kl(self.q_mean(x0, xt, t), low, mean, log_variance).mean(dim=(1, 2, 3))
        decoder = -discretised_log_likelihood(x0, mean, 0.5 * log_variance).mean(dim=(1, 2, 3))
        return torch.where(t == 0, decoder, divergence) / math.log(2)

    def x0_coefficients(self, t: NDArray[np.int64]) -> tuple[Table, Table]:
        """(p, q), float64 [len(t)] each: x_0 = p·x_t - q·out, whatever the network predicts."""
        if (sigmas := self.config.sigmas) is not None:
            return sigmas.x0_coefficients(sigmas.levels(self.num_timesteps)[t], self.config.prediction == "consistency")
        alpha, sigma = np.sqrt(self.alphas_cumprod[t]), np.sqrt(1 - self.alphas_cumprod[t])
        if self.config.prediction == "eps":
            return 1 / alpha, sigma / alpha
        if self.config.prediction == "x0":
            return np.zeros_like(alpha), -np.ones_like(alpha)
        return alpha, sigma


def require_one_of(name: str, value: str, valid: Collection[str]) -> None:
    """Raises ValueError, listing the valid values, where `value` is none of them."""
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}, not {value!r}")
