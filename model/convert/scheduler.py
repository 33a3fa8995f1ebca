"""The diffusion of a diffusers scheduler: of its configuration, nothing is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.convert.betas import SCHEDULES, betas_of, diffusion_of
from model.convert.layout import UnsupportedCheckpointError
from model.diffusion import KARRAS, DiffusionConfig, Table
from model.sampling.solvers import CONSISTENCY
from model.sigmas import Sigmas

PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
CM_SCHEDULER = "CMStochasticIterativeScheduler"
CM_SIGMAS = ("sigma_min", "sigma_max", "sigma_data", "rho")
CM_TIME_SCALE = 1000.0
CLIPS = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")  # unless told not to
SCHEDULERS = (
    *CLIPS,
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DPMSolverSDEScheduler",
    CM_SCHEDULER,
)
STABLE_DIFFUSIONS = ("HeunDiscreteScheduler", "DPMSolverSDEScheduler")  # betas 0.00085 to 0.012 where none are given
UNLIMITED = 1000.0  # a sample_max_value that no prediction of x0 reaches
REAL = (int, float)


def find_scheduler(source: Path, unet: Path) -> Path | None:
    """The scheduler's configuration that belongs to a network in `unet`, where the user named `source`.

    It is in `scheduler/` or beside, in the pipeline's folder: that of the source, or the one above a network's or a
    training checkpoint's.
    """
    for folder in _around(source, unet):
        for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
            if path.exists():
                return path
    return None


def _around(source: Path, unet: Path) -> Iterator[Path]:
    folder = source.resolve()
    yield folder
    yield unet.resolve()
    if folder.name.startswith("unet"):
        folder = folder.parent
        yield folder
    if folder.name.startswith("checkpoint-"):
        yield folder.parent


def read(theirs: dict[str, Any], learned_variance: bool) -> tuple[DiffusionConfig, str, tuple[str, ...]]:
    """Their configuration in our words, the limit of x0, and what it does not tell and was assumed.

    Raises UnsupportedCheckpointError, by the name of the field, for what ours cannot express.
    """
    name = theirs.get("_class_name")
    if name not in SCHEDULERS:
        kind = f"a {name}" if name else "of a class that it does not name"
        raise UnsupportedCheckpointError(
            f"its scheduler is {kind}; those that can be imported are {', '.join(SCHEDULERS)}"
        )
    if name == CM_SCHEDULER:
        return _of_consistency(theirs, learned_variance)
    for field in ("use_flow_sigmas", "use_dynamic_shifting"):
        if theirs.get(field):
            raise UnsupportedCheckpointError(f"its scheduler's {field} is true, which cannot be expressed here")
    if theirs.get("timestep_type", "discrete") != "discrete":
        raise UnsupportedCheckpointError(
            f"its scheduler's timestep_type is {theirs['timestep_type']!r}, not 'discrete'"
        )
    prediction = theirs.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        raise UnsupportedCheckpointError(f"its scheduler's prediction_type {prediction!r} cannot be expressed here")
    variance = theirs.get("variance_type")
    assumed: tuple[str, ...] = ()
    if variance is None:
        variance = "learned_range" if learned_variance else "fixed_small"
        assumed = (f"variance {variance}: its scheduler names none",)
    if variance not in VARIANCES or (variance == "learned_range") != learned_variance:
        raise UnsupportedCheckpointError(f"its scheduler's variance_type {variance!r} cannot be expressed here")
    plain = diffusion_of(_betas(theirs), prediction=PREDICTIONS[prediction], variance=VARIANCES[variance])
    rescaled = _value(theirs, "rescale_betas_zero_snr", False, lambda v: isinstance(v, bool))
    if rescaled and plain.prediction == "eps":
        raise UnsupportedCheckpointError(
            "its scheduler's rescale_betas_zero_snr needs a prediction_type other than epsilon"
        )
    return replace(plain, zero_terminal_snr=rescaled), _limit(theirs), assumed


def _of_consistency(theirs: dict[str, Any], learned_variance: bool) -> tuple[DiffusionConfig, str, tuple[str, ...]]:
    if learned_variance:
        raise UnsupportedCheckpointError("it is a consistency model with a learned variance, which cannot be sampled")
    _value(theirs, "s_noise", 1.0, lambda v: v == 1)
    usual = Sigmas()
    told = {
        name: float(_value(theirs, name, getattr(usual, name), lambda v: type(v) in REAL and v > 0))
        for name in CM_SIGMAS
    }
    sigmas = Sigmas(**told, time_scale=CM_TIME_SCALE)
    limit = "clamp" if _value(theirs, "clip_denoised", True, lambda v: isinstance(v, bool)) else "none"
    return DiffusionConfig(schedule=KARRAS, prediction=CONSISTENCY, sigmas=sigmas), limit, ()


def _betas(theirs: dict[str, Any]) -> Table:
    steps = _value(theirs, "num_train_timesteps", 1000, lambda v: isinstance(v, int) and 2 <= v <= 100_000)
    low, high = (8.5e-4, 0.012) if theirs["_class_name"] in STABLE_DIFFUSIONS else (1e-4, 0.02)
    if (trained := theirs.get("trained_betas")) is not None:
        if not isinstance(trained, list) or not all(type(beta) in REAL for beta in trained):
            raise UnsupportedCheckpointError("its scheduler's trained_betas are not a list of numbers")
        return np.array(trained, np.float64)
    schedule = theirs.get("beta_schedule", "linear")
    if schedule not in SCHEDULES:
        raise UnsupportedCheckpointError(
            f"its beta_schedule is {schedule!r}; those that can be imported are {', '.join(SCHEDULES)}"
        )
    low, high = (
        _value(theirs, name, usual, lambda v: type(v) in REAL and 0 < v < 1)
        for name, usual in (("beta_start", low), ("beta_end", high))
    )
    return betas_of(schedule, steps, low, high)


def _limit(theirs: dict[str, Any]) -> str:
    """Of x0, as their step has it: thresholding, or else a clamp."""
    if theirs.get("thresholding"):
        most = _value(theirs, "sample_max_value", 1.0, lambda v: type(v) in REAL and (v == 1 or v >= UNLIMITED))
        if most == 1:
            return "clamp"  # whatever the quantile is
        _value(theirs, "dynamic_thresholding_ratio", 0.995, lambda v: v == 0.995)
        return "dynamic"
    if not theirs.get("clip_sample", theirs["_class_name"] in CLIPS):
        return "none"
    _value(theirs, "clip_sample_range", 1.0, lambda v: v == 1)
    return "clamp"


def _value(theirs: dict[str, Any], name: str, usual: Any, valid: Callable[[Any], bool]) -> Any:
    """A field; `usual` where it is not there or null. Raises UnsupportedCheckpointError where it is not valid."""
    value = usual if theirs.get(name) is None else theirs[name]
    if not valid(value):
        raise UnsupportedCheckpointError(f"its scheduler's {name} is {value!r}, which cannot be expressed here")
    return value
