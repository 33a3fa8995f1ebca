"""python -m training.distill: a tiny teacher and its students."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.convert.importer import main as import_main
from model.diffusion import DiffusionConfig
from model.distilled import Distilled
from model.nn.config import LucidrainsConfig
from model.nn.unet import UNet
from model.sampling.schedule import FITTED, SamplingParams
from model.sampling.step import sample
from tests.fixtures import theirs
from tests.networks import randomised
from tests.training.distillation.conftest import G, log
from training import distill
from training.distillation.config import DistillConfig
from training.distillation.trajectories import OWN_SEEDS, Trajectories
from training.export_checkpoint import main as export_main


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sfd", "end_to_end"])
def test_a_one_step_student_learns_its_teacher(words: list[str], teacher: str, tmp_path: Path, method: str) -> None:
    more = [
        "--steps",
        "1",
        "--method",
        method,
        "--learning_rate",
        "1e-2",
        "--iterations",
        "30",
        "--checkpoint_rate",
        "10",
        "--ema_decay",
        "0",
    ]
    assert distill.main([*words, *more]) == 0
    distances = [line["validation_loss"] for line in log(tmp_path / "runs/run") if "validation_loss" in line]
    assert distances[-1] < 0.6 * distances[0]
    student = checkpoint.load(tmp_path / "runs/run/best.safetensors")
    assert student.config.distilled == Distilled(G, 1, method, checkpoint.load(teacher).sha256)
    assert student.config.sampling == SamplingParams(FITTED, 1, 0.0, G)
    assert student.config.schedule(student.config.sampling).nfe.tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["end_to_end", "sfd", "guidance"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_compiled_student_is_compiled_whole_and_learns_the_same(
    words: list[str], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --compile in its card's command, and on after a resume."""
    words = [*words, "--method", method, "--lr_schedule", "constant"]
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter, fullgraph=True))
    assert distill.main(words) == 0
    assert counter.frame_count == 0
    assert distill.main([*words, "--compile", "--run_name", "half", "--iterations", "4"]) == 0
    assert counter.frame_count > 2  # besides the compiler's trial and that of the gradient
    assert distill.main(["--resume", str(tmp_path / "runs/half"), "--iterations", "8"]) == 0
    a, b = (checkpoint.load(tmp_path / f"runs/{name}/checkpoint-0000008.safetensors") for name in ("run", "half"))
    assert "--compile" in b.config.provenance["command"]
    for name, weight in a.network.state_dict().items():
        torch.testing.assert_close(b.network.state_dict()[name], weight, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_guidance_moves_into_one_row(words: list[str], tmp_path: Path) -> None:
    more = ["--method", "guidance", "--iterations", "40", "--log_rate", "10"]
    assert distill.main([*words, *more]) == 0
    losses = [line["train_loss"] for line in log(tmp_path / "runs/run") if "train_loss" in line]
    assert losses[-1] < 0.5 * losses[0]


def drift(path: Path, teacher: str, null: bool) -> float:
    """How far a student is from its teacher at all timesteps: mean squared difference of what the networks say."""
    x = torch.randn(64, *checkpoint.load(teacher).config.unet.image_shape, generator=torch.Generator().manual_seed(0))
    t, y = torch.linspace(0, 999, 64).long(), torch.full((64,), 3) if null else torch.arange(64) % 3
    with torch.no_grad():
        outs = [checkpoint.load(of).network(x, t, y) for of in (path, teacher)]
    return float((outs[0] - outs[1]).square().mean())


@pytest.mark.slow
def test_an_anchored_student_keeps_samplers_and_guidance(words: list[str], teacher: str, tmp_path: Path) -> None:
    more = ["--ema_decay", "0", "--iterations", "24", "--checkpoint_rate", "24"]
    assert distill.main([*words, *more]) == 0
    assert distill.main([*words, *more, "--run_name", "anchored", "--anchor", "300"]) == 0
    free, anchored = (tmp_path / f"runs/{name}/best.safetensors" for name in ("run", "anchored"))
    for null in (False, True):
        assert 0 < drift(anchored, teacher, null) < 0.2 * drift(free, teacher, null)
    config = checkpoint.load(anchored).config
    assert config.distilled is None
    assert config.sampling == SamplingParams(FITTED, 2, 0.0, G)
    assert config.schedule(config.sampling).nfe.tolist() == [1, 1]
    other = config.sampling_params(sampler="ddim", steps=5, guidance_scale=3.0)
    assert config.schedule(other).nfe.tolist() == [2] * 5


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bytes(words: list[str], tmp_path: Path) -> None:
    assert distill.main([*words, "--lr_schedule", "constant"]) == 0
    assert distill.main([*words, "--lr_schedule", "constant", "--run_name", "half", "--iterations", "4"]) == 0
    assert distill.main(["--resume", str(tmp_path / "runs/half"), "--iterations", "8"]) == 0
    whole, half = tmp_path / "runs/run", tmp_path / "runs/half"
    assert log(whole) == log(half)
    assert (whole / "best.safetensors").read_bytes() == (half / "best.safetensors").read_bytes()
    states = [torch.load(where / "state-0000008.pt", weights_only=True) for where in (whole, half)]
    assert all(torch.equal(states[0]["network"][name], states[1]["network"][name]) for name in states[0]["network"])
    assert (whole / "samples-0000008.png").exists()
    assert (whole / "sequence-0000008.gif").exists()


def test_trajectories_are_the_guided_teachers(teacher: str, tmp_path: Path) -> None:
    source = checkpoint.load(teacher)
    params = SamplingParams("dpmpp_2m", 4, 0.0, G)
    kept = Trajectories(source, params, torch.device("cpu"), 3, 40, tmp_path, "fp32")
    assert kept.make()
    which = torch.tensor([5, 1])
    seen: list[torch.Tensor] = []
    sample(
        source.network,
        kept.schedule,
        (1, 8, 8),
        [OWN_SEEDS + 3] * 2,
        [5, 1],
        [2, 1],
        null_class=3,
        on_step=lambda _, x, __: seen.append(x),
    )
    assert torch.allclose(kept.states(which), torch.stack(seen, dim=1), atol=1e-4)
    again = Trajectories(source, params, torch.device("cpu"), 3, 40, tmp_path, "fp32")
    assert torch.equal(again.states(which), kept.states(which))  # without make
    fresh = Trajectories(source, params, torch.device("cpu"), 3, 0, tmp_path, "fp32")
    assert torch.allclose(fresh.states(which), kept.states(which), atol=1e-4)


@pytest.mark.slow
def test_a_run_without_kept_trajectories_leaves_none(words: list[str], tmp_path: Path) -> None:
    assert distill.main([*words, "--trajectories", "0", "--iterations", "2"]) == 0
    assert not list((tmp_path / "runs").glob("*.features"))


@pytest.mark.slow
def test_the_extractor_decides_which_student_is_best(
    words: list[str], tmp_path: Path, save_extractor: Callable[..., str]
) -> None:
    assert distill.main([*words, "--features", save_extractor(), "--iterations", "4"]) == 0
    line = log(tmp_path / "runs/run")[-1]
    assert line["validation_features"] > 0


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--steps", "9"], "--steps must be from 1 to 8, not 9"),
        (["--steps", "0"], "--steps must be from 1 to 8, not 0"),
        (["--teacher_steps", "1"], "--teacher_steps 1 are fewer than the student's --steps 2"),
        (["--timesteps", "999"], "--timesteps are 1, where --steps says 2"),
        (["--timesteps", "999,3"], "--timesteps 3 is none of the teacher's: 999, 749, 499, 249"),
        (["--timesteps", "499,999"], "--timesteps 499,999 must fall, and begin with the teacher's first, 999"),
        (["--teacher_steps", "2000"], "the teacher has no more than 1000 timesteps"),
        (["--guidance_scale", "nan"], "--guidance_scale must be finite"),
        (["--method", "sdf"], "must be one of end_to_end, sfd, guidance, not 'sdf'; did you mean sfd?"),
        (["--features", "nothing.safetensors"], "nothing.safetensors is not a readable classifier"),
        (["--teacher", "nothing"], "no checkpoint 'nothing'"),
        (["--learning_rate", "0"], "--learning_rate must be between 0 and 1"),
        (["--precison", "bf16"], "there is no option --precison; did you mean --precision?"),
        (["--method", "guidance", "--timesteps", "999,499"], "--method guidance learns all timesteps"),
        (["--method", "sfd", "--anchor", "1"], "--anchor is for --method end_to_end, not sfd"),
        (["--anchor", "-1"], "--anchor must not be negative"),
    ],
)
def test_bad_input_gets_a_sentence_and_writes_nothing(
    words: list[str], more: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    try:
        status: Any = distill.main([*words, *more])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert sentence in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_teacher_without_null_class_cannot_be_guided(
    words: list[str], save_checkpoint: Callable[..., str], tiny: UNet, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_checkpoint(replace(tiny.config, null_class=False))
    assert distill.main([*words, "--teacher", path, "--guidance_scale", "2"]) == 2
    assert "the teacher has no null class to guide away from, so it must be 1" in capsys.readouterr().err


def test_levels_of_noise_teach_no_student(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "edm.safetensors")
    assert import_main([str(theirs("edm/adm.pt")), path]) == 0
    assert distill.main([*words, "--teacher", path]) == 2
    assert "has EDM's levels of noise, which no student can be taught here" in capsys.readouterr().err


@pytest.fixture
def student(words: list[str], tmp_path: Path) -> str:
    """One of two steps, which may teach."""
    assert distill.main([*words, "--iterations", "1", "--run_name", "first"]) == 0
    return str(tmp_path / "runs/first/best.safetensors")


@pytest.mark.slow
def test_a_student_teaches_one_of_fewer_steps(words: list[str], tmp_path: Path, student: str) -> None:
    at = words.index("--teacher_steps")
    assert distill.main([*words[:at], *words[at + 2 :], "--teacher", student, "--steps", "1", "--iterations", "2"]) == 0
    found = checkpoint.load(tmp_path / "runs/run/best.safetensors").config
    assert (found.sampling.steps, found.sampling.guidance_scale) == (1, G)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--guidance_scale", "1"], "--guidance_scale 1: the teacher is distilled, and has 2 inside"),
        (["--teacher_steps", "5"], "--teacher_steps 5: the teacher is distilled to 2"),
        (["--teacher_steps", "2", "--method", "guidance"], "the teacher is distilled, and has its guidance inside"),
    ],
)
def test_a_student_teaches_what_is_inside_alone(
    words: list[str], student: str, more: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main([*words, "--teacher", student, "--steps", "1", *more]) == 2
    assert sentence in capsys.readouterr().err


def test_a_resume_keeps_what_its_weights_mean(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main([*words, "--iterations", "1"]) == 0
    with pytest.raises(SystemExit):
        distill.main(["--resume", str(tmp_path / "runs/run"), "--steps", "3"])
    assert "--steps cannot change on --resume: the run has 2" in capsys.readouterr().err


def test_the_command_of_a_run_makes_it_again(teacher: str) -> None:
    config = DistillConfig(
        teacher=teacher, steps=3, timesteps=(999, 500, 249), features="judge", compile=True, run_name="x"
    )
    words = config.command().split()[3:]
    assert words[-1] == "--compile"
    found, resume = distill.parse([*words, "--run_name", "x"])
    assert (found, resume) == (config, False)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["weights", "sampling", "width", "features"])
def test_a_resume_keeps_its_teacher(
    words: list[str],
    teacher: str,
    tmp_path: Path,
    tiny: UNet,
    how: str,
    save_extractor: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    judge = save_extractor()
    assert distill.main([*words, "--iterations", "4", "--features", judge]) == 0
    source = checkpoint.load(teacher)
    config, network = source.config, randomised(tiny.config, seed=7) if how == "weights" else source.network
    if how == "sampling":
        config = replace(config, sampling=replace(config.sampling, limit="none"))
    elif how == "width":
        network = randomised(replace(tiny.config, base_channels=24))
    elif how == "features":
        save_extractor(seed=1)
    checkpoint.save(teacher, network.state_dict(), replace(config, unet=network.config))
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
    assert distill.main(["--resume", str(tmp_path / "runs/run"), "--iterations", "8"]) == 2
    sentence = f"--teacher {teacher} or --features has changed since {tmp_path / 'runs/run'} began: begin anew\n"
    assert capsys.readouterr().err.endswith(sentence)
    assert {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()} == before


def test_a_teacher_with_a_new_table_still_teaches(words: list[str], teacher: str, tmp_path: Path) -> None:
    assert distill.main([*words, "--iterations", "1"]) == 0
    source = checkpoint.load(teacher)
    checkpoint.save(teacher, source.network.state_dict(), replace(source.config, provenance={"notes": "fitted"}))
    assert distill.main(["--resume", str(tmp_path / "runs/run"), "--iterations", "2"]) == 0


def test_the_network_of_lucidrains_teaches(words: list[str], tmp_path: Path) -> None:
    path, unet = tmp_path / "other.safetensors", LucidrainsConfig(1, (8, 8), 8, 8, (1,), (True,), (2, 2), (4, 4))
    diffusion, sampling = DiffusionConfig(schedule="cosine", prediction="v"), SamplingParams("dpmpp_2m", 20)
    checkpoint.save(path, randomised(unet).state_dict(), CheckpointConfig(unet, diffusion, (), sampling))
    assert distill.main([*words, "--teacher", str(path), "--iterations", "1"]) == 0
    assert checkpoint.load(tmp_path / "runs/run/best.safetensors").config.unet == unet


def test_raw_weights_of_a_student_have_its_steps(words: list[str], tmp_path: Path) -> None:
    assert distill.main([*words, "--iterations", "2"]) == 0
    exported = tmp_path / "raw.safetensors"
    assert export_main([str(tmp_path / "runs/run"), str(exported), "--weights", "raw"]) == 0
    found, served = (checkpoint.load(p).config for p in (exported, tmp_path / "runs/run/best.safetensors"))
    assert found.sampling == served.sampling
    assert (found.distilled, found.fitted[0].rows) == (served.distilled, served.fitted[0].rows)


def test_a_foreign_state_is_passed_over(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert distill.main([*words, "--iterations", "1"]) == 0
    torch.save([1, 2], tmp_path / "runs/run/state-0000002.pt")
    assert distill.main(["--resume", str(tmp_path / "runs/run"), "--iterations", "2"]) == 0
    assert "state-0000002.pt cannot be read, so an older one is tried" in capsys.readouterr().err


def test_a_resume_needs_no_more_what_it_began_with(words: list[str], student: str, tmp_path: Path) -> None:
    assert distill.main([*words, "--iterations", "1", "--student", student]) == 0
    Path(student).unlink()
    assert distill.main(["--resume", str(tmp_path / "runs/run"), "--iterations", "2"]) == 0


def test_a_student_begins_with_the_same_network(
    words: list[str], save_checkpoint: Callable[..., str], tiny: UNet, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_checkpoint(replace(tiny.config, base_channels=24))
    assert distill.main([*words, "--student", other]) == 2
    assert f"--student {other} is another network than the teacher's" in capsys.readouterr().err


def test_a_classifier_of_other_images_is_refused(
    words: list[str], save_extractor: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill.main([*words, "--features", save_extractor(channels=3)]) == 2
    assert "takes images of (channels, height, width) (3, 8, 8), the teacher makes (1, 8, 8)" in capsys.readouterr().err


def test_a_resume_of_a_run_that_is_done_has_nothing_to_do(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "runs/run"
    assert distill.main([*words, "--iterations", "2"]) == 0
    assert distill.main(["--resume", str(run)]) == 0
    assert f"Nothing to do: {run} has done its 2 iterations; give more --iterations to go on" in capsys.readouterr().out
    assert distill.main(["--resume", str(run), "--iterations", "1"]) == 2
    assert f"--iterations 1: {run} has done 2 already; give more" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"teacher": 7}', '{"teacher": "a", "steps": "2"}', '{"colour": 1}'])
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SystemExit):
        distill.main(["--resume", str(tmp_path)])
    assert f"--resume {tmp_path}: its config.json is not that of a distillation: " in capsys.readouterr().err
