"""Several checkpoints in one process, and others that take their place while requests are under way."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.nn.config import UNetConfig
from tests.app.conftest import CLASSES, COLOUR, GREY, write_checkpoint
from tests.app.faulty_server import REFUSED, SLOW
from tests.app.processes import PATIENCE, ServerProcess, metric, run_to_its_end, wait_for

pytestmark = pytest.mark.slow  # each test has a server of its own

FAULTY = "tests.app.faulty_server"
ADMIN, GUEST = "admin-0123456789abcdef", "guest-0123456789abcdef"
LOAD_OUTCOMES = ("loaded", "unchanged", "invalid_checkpoint", "load_failed", "out_of_memory")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Shop:
    """A folder of checkpoints with random weights: two versions of `one`, one of `two`, and what is not good."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions = [self._written(folder / f"version-{seed}", GREY, CLASSES, seed) for seed in range(3)]
        self.colour = self._written(folder / "version-colour", COLOUR, (), 0)
        self.hashes = [sha256(version) for version in self.versions]
        self.models = folder / "models"
        self.one, self.two = self.models / "one.safetensors", self.models / "two.safetensors"
        self.refill()
        self.keys = folder / "keys.toml"
        self.keys.write_text(
            "".join(
                f'[{name}]\nsha256 = "{hashlib.sha256(key.encode()).hexdigest()}"\n{more}'
                for name, key, more in (("boss", ADMIN, "admin = true\n"), ("guest", GUEST, ""))
            )
        )

    def _written(self, path: Path, unet: UNetConfig, classes: tuple[str, ...], seed: int) -> Path:
        return write_checkpoint(path.with_suffix(".safetensors"), unet, classes, seed)

    def refill(self) -> None:
        """Only `one` and `two` are there, in their first versions."""
        shutil.rmtree(self.models, ignore_errors=True)
        self.models.mkdir()
        self.put(self.versions[0], self.one)
        self.put(self.colour, self.two)

    def put(self, source: Path, target: Path) -> None:
        """As a deployment does: the old file or the new one, and nothing between."""
        part = target.with_suffix(".part")
        shutil.copyfile(source, part)
        os.replace(part, target)

    def argv(self, *served: Path) -> list[str]:
        checkpoints = ",".join(map(str, served or (self.one, self.two)))
        return ["--checkpoint", checkpoints, "--models-dir", str(self.models), "--api-keys-file", str(self.keys)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


class KeyedServer(ServerProcess):
    """Its own client has the administrator's key."""

    def __enter__(self) -> KeyedServer:
        super().__enter__()
        self.client.headers["Authorization"] = f"Bearer {ADMIN}"
        return self


@pytest.fixture
def server(shop: Shop) -> Iterator[KeyedServer]:
    shop.refill()
    with KeyedServer(FAULTY, *shop.argv(), "--max-batch-size", "4") as server:
        yield server


def load(server: ServerProcess, name: str) -> httpx.Response:
    return server.client.post("/models", json={"name": name})


def generate(server: ServerProcess, **body: Any) -> httpx.Response:
    return server.client.post("/generate", json=body)


def cards(server: ServerProcess) -> dict[str, dict[str, Any]]:
    return {card["name"]: card for card in server.client.get("/models").json()["models"]}


def loads(server: ServerProcess, model: str) -> dict[str, float]:
    text = server.client.get("/metrics").text
    counts = {
        outcome: metric(text, "ddpm_model_loads_total", model=model, outcome=outcome) for outcome in LOAD_OUTCOMES
    }
    return {outcome: count for outcome, count in counts.items() if count}


def reload(server: ServerProcess, attempts: int) -> None:
    """SIGHUP, and until so many attempts to load were counted."""
    before = server.metric("ddpm_model_loads_total")
    server.process.send_signal(signal.SIGHUP)
    wait_for(lambda: server.metric("ddpm_model_loads_total") == before + attempts, "the attempts")


def hear(server: ServerProcess, said: str) -> None:
    """Waits until this is the last error that was logged about models."""

    def last() -> str:
        lines = [line for line in server.logs() if line["logger"] == "ddpm.models" and line["level"] == "error"]
        return str(lines[-1]["message"]) if lines else ""

    wait_for(lambda: said in last(), said)


BODIES: list[dict[str, Any]] = [{"n": 1 + i % 2, "steps": 30 + i, "seed": i, "class_label": i % 3} for i in range(5)]


def test_requests_choose_a_model_and_the_first_is_the_default(server: KeyedServer, shop: Shop) -> None:
    found = cards(server)
    assert list(found) == ["one", "two"]
    assert [(card["default"], card["state"]) for card in found.values()] == [(True, "ready"), (False, "ready")]
    assert [card["checkpoint"] for card in found.values()] == [shop.hashes[0], sha256(shop.colour)]
    assert found["two"]["image_shape"] == [3, 8, 8]
    for body, name in (({}, "one"), ({"model": "one"}, "one"), ({"model": "two"}, "two")):
        answer = generate(server, n=2, seed=3, **body)
        assert (answer.headers["x-ddpm-model"], answer.headers["x-ddpm-checkpoint"]) == (
            name,
            found[name]["checkpoint"],
        )
        asked = {"n": 2, "seed": 3, "frames": 2, **body}
        stream = server.client.get("/diffusion-sequence", params=asked)
        assert stream.headers["x-ddpm-model"] == name
        assert "event: completed" in stream.text
    for answer in (
        generate(server, model="three"),
        generate(server, model="../models/one"),
        generate(server, model=""),
        server.client.get("/diffusion-sequence", params={"model": "three"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        assert answer.json()["error"]["param"] == "model"
        assert answer.json()["error"]["message"].endswith("there are one, two")
    assert generate(server, model="two", class_label=0).json()["error"]["code"] == "invalid_class_label"
    for name, sha in ((name, card["checkpoint"]) for name, card in found.items()):
        assert server.metric("ddpm_model_info", model=name, sha256=sha) == 1
        assert server.metric("ddpm_images_total", model=name) == (8 if name == "one" else 4)


def test_each_models_images_are_those_of_a_server_of_its_own(server: KeyedServer, shop: Shop) -> None:
    bodies = {"one": BODIES, "two": [body | {"class_label": None} for body in BODIES]}
    with KeyedServer(FAULTY, *shop.argv(shop.two), "--max-batch-size", "4") as other:
        alone = [generate(other, **body).content for body in bodies["two"]]
    alone = [generate(server, **body).content for body in bodies["one"]] + alone
    with ThreadPoolExecutor(10) as pool:
        asked = [body | {"model": name} for name in bodies for body in bodies[name]]
        together = list(pool.map(lambda body: generate(server, **body).content, asked))
    assert together == alone


def test_a_long_queue_at_one_model_does_not_starve_another(server: KeyedServer) -> None:
    """With the device's time shared, ten steps of one model's take as long as ten of the other's."""
    with ThreadPoolExecutor(4) as pool:
        crowd = [pool.submit(generate, server, n=8, steps=40, seed=SLOW) for _ in range(4)]
        wait_for(lambda: server.metric("ddpm_image_steps_total", model="one") > 40, "the crowd's first steps")
        before = server.metric("ddpm_step_seconds_count", model="one")
        assert generate(server, model="two", steps=10, seed=SLOW).status_code == 200
        steps = server.metric("ddpm_step_seconds_count", model="one") - before
        assert steps < 4 * 10, "of 320 that the crowd needs"
        assert server.metric("ddpm_num_samples_waiting", model="one") > 0
        assert server.metric("ddpm_num_samples_waiting", model="two") == 0
        for other in crowd:
            assert other.result().status_code == 200
    assert server.metric("ddpm_batch_size_bucket", model="one", le="4.0") == server.metric(
        "ddpm_batch_size_count", model="one"
    )


@contextmanager
def work_under_way(server: ServerProcess, **more: Any) -> Iterator[list[Any]]:
    """Images and a stream that last until they are asked for; each as (seed, sha256, content)."""
    with ThreadPoolExecutor(4) as pool:
        slow = {"n": 2, "steps": 60, "seed": SLOW, **more}
        running = [pool.submit(generate, server, index=10 * i, **slow) for i in range(3)]
        stream = pool.submit(server.client.get, "/diffusion-sequence", params={**slow, "frames": 5})
        wait_for(lambda: server.samples_in_flight() == 8, "work")
        yield [*running, stream]


def test_a_swap_under_load_harms_nobody(server: KeyedServer, shop: Shop) -> None:
    old_alone = [generate(server, **body) for body in BODIES]
    slow_alone = [generate(server, n=2, steps=60, seed=SLOW, index=10 * i).content for i in range(3)]
    shop.put(shop.versions[1], shop.one)
    with work_under_way(server) as running:
        swapped = load(server, "one")
        assert swapped.status_code == 200
        assert (swapped.json()["replaced"], swapped.json()["checkpoint"]) == tuple(shop.hashes[:2])
        assert not any(work.done() for work in running), "it was swapped while they ran"
        later = [generate(server, **body) for body in BODIES]
        answers = [work.result() for work in running]
    assert [answer.status_code for answer in answers + later] == [200] * 9
    assert [answer.headers["x-ddpm-checkpoint"] for answer in answers] == [shop.hashes[0]] * 4
    assert [answer.content for answer in answers[:3]] == slow_alone
    assert "event: completed" in answers[3].text
    assert [answer.headers["x-ddpm-checkpoint"] for answer in later] == [shop.hashes[1]] * 5
    assert all(new.content != old.content for new, old in zip(later, old_alone, strict=True))
    assert server.metric("ddpm_model_info", model="one") == 1
    assert server.metric("ddpm_model_info", model="one", sha256=shop.hashes[1]) == 1
    assert server.metric("ddpm_engine_restarts_total") == server.metric("ddpm_failed_steps_total") == 0

    shop.put(shop.versions[0], shop.one)
    assert load(server, "one").json()["replaced"] == shop.hashes[1]
    assert [generate(server, **body).content for body in BODIES] == [answer.content for answer in old_alone]
    again = load(server, "one").json()
    assert again["replaced"] == again["checkpoint"] == shop.hashes[0]
    assert loads(server, "one") == {"loaded": 2, "unchanged": 1}
    assert list(cards(server)) == ["one", "two"], "the default is the same"
    gone = [line for line in server.logs() if line["message"] == "model unloaded"]
    assert [line["sha256"] for line in gone] == [shop.hashes[0], shop.hashes[1]]


def test_sighup_swaps_what_has_changed_and_keeps_what_is_broken(server: KeyedServer, shop: Shop) -> None:
    image = generate(server, seed=1).content
    broken = shop.folder / "broken.safetensors"
    whole = shop.versions[1].read_bytes()
    for content, said in (
        (whole[: len(whole) // 2], "is not a readable safetensors file"),
        (b"", "is not a readable safetensors file"),
        (os.urandom(1000), "is not a readable safetensors file"),
        (b"\x80\x04cos\nsystem\n(S'exit'\ntR.", "is not a readable safetensors file"),
        (None, "no checkpoint 'one': neither a file nor bundled"),
    ):
        if content is None:
            shop.one.unlink()
        else:
            broken.write_bytes(content)
            shop.put(broken, shop.one)
        reload(server, 2)
        hear(server, said)
        refused = load(server, "one")
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_checkpoint")
        assert said in refused.json()["error"]["message"]
        assert str(shop.folder) not in refused.text
        assert generate(server, seed=1).content == image
        assert server.client.get("/readyz").status_code == 200
    assert loads(server, "one") == {"invalid_checkpoint": 10}
    assert loads(server, "two") == {"unchanged": 5}
    shop.put(shop.versions[2], shop.one)
    reload(server, 2)
    assert loads(server, "one") == {"invalid_checkpoint": 10, "loaded": 1}
    assert cards(server)["one"]["checkpoint"] == shop.hashes[2]
    assert generate(server, seed=1).content != image


def test_a_checkpoint_that_does_not_run_keeps_the_old_one(server: KeyedServer, shop: Shop) -> None:
    image = generate(server, seed=1).content
    shop.put(write_checkpoint(shop.folder / "refused.safetensors", GREY, (*CLASSES[:2], REFUSED), 5), shop.one)
    with work_under_way(server) as running:
        refused = load(server, "one")
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "load_failed")
        assert [work.result().status_code for work in running] == [200] * 4
    assert generate(server, seed=1).content == image
    assert loads(server, "one") == {"load_failed": 1}
    assert not [line for line in server.logs() if line["level"] == "critical"]


def test_a_model_comes_from_the_folder_and_goes_again(server: KeyedServer, shop: Shop) -> None:
    shop.put(shop.versions[1], shop.models / "new.safetensors")
    assert generate(server, model="new").status_code == 404
    loaded = load(server, "new").json()
    assert (loaded["name"], loaded["replaced"], loaded["default"]) == ("new", None, False)
    assert generate(server, model="new").headers["x-ddpm-checkpoint"] == shop.hashes[1]
    assert server.metric("ddpm_max_batch_size", model="new") == 4
    with work_under_way(server, model="new") as running:
        left = server.client.delete("/models/new")
        assert [card["name"] for card in left.json()["models"]] == ["one", "two"]
        assert generate(server, model="new").status_code == 404
        assert [work.result().status_code for work in running] == [200] * 4
    wait_for(lambda: 'ddpm_max_batch_size{model="new"}' not in server.client.get("/metrics").text, "its end")
    assert server.metric("ddpm_model_info", model="new") == 0
    assert server.metric("ddpm_images_total", model="new") == 9, "what it did stays counted"
    for name, status, code in (("new", 404, "model_not_found"), ("one", 409, "model_conflict")):
        answer = server.client.delete(f"/models/{name}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_only_admins_change_models_by_names_in_the_folder(server: KeyedServer, shop: Shop) -> None:
    outside = shop.folder / "outside.safetensors"
    shop.put(shop.versions[1], outside)
    os.symlink(outside, shop.models / "link.safetensors")
    (shop.models / "inner").mkdir()
    shop.put(shop.versions[1], shop.models / "inner" / "deep.safetensors")
    os.symlink(shop.models / "inner" / "deep.safetensors", shop.models / "within.safetensors")
    shop.put(shop.versions[1], shop.models / ".hidden.safetensors")
    (shop.models / "folder.safetensors").mkdir()
    body = {"name": "two"}
    for headers, status, code in (
        ({}, 401, "unauthorized"),
        ({"Authorization": f"Bearer {GUEST}"}, 403, "forbidden"),
        ({"Authorization": f"Bearer {ADMIN}x"}, 401, "unauthorized"),
    ):
        for method, path in (("POST", "/models"), ("DELETE", "/models/two")):
            answer = httpx.request(method, server.url + path, json=body, headers=headers, timeout=PATIENCE)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    for name in (
        *("nothing", "link", "inner/deep", ".hidden", "folder", "one.safetensors", "mnist", "", "."),
        *("..", "../outside", "../models/one", str(outside), "one/", "one\0", "one\n", "x" * 5000, "-", "é", "%2e%2e"),
    ):
        answer = load(server, name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), name
        assert answer.json()["error"]["message"].endswith("; there are one, two, within"), name
        assert len(answer.text) < 500
    for wrong in ({}, {"name": 1}, {"name": None}, {"name": "two", "path": "/x"}, [], "two"):
        assert server.client.post("/models", json=wrong).status_code == 422
    assert server.client.delete("/models/..%2fone").status_code == 404
    assert load(server, "within").status_code == 200
    text = server.client.get("/metrics").text
    assert metric(text, "ddpm_model_loads_total") == 1, "names that are not there are not counted under them"


def test_one_load_at_a_time(server: KeyedServer, shop: Shop) -> None:
    shop.put(shop.versions[1], shop.one)
    with work_under_way(server), ThreadPoolExecutor(1) as pool:  # so that each portion of the warm-up waits for a step
        first = pool.submit(load, server, "one")
        wait_for(lambda: server.client.get("/models").json()["loading"] == "one", "the load")
        assert cards(server)["one"]["state"] == "loading"
        for second in (load(server, "two"), load(server, "one"), server.client.delete("/models/one")):
            assert (second.status_code, second.json()["error"]["code"]) == (409, "model_conflict")
        assert first.result().status_code == 200
    assert server.client.get("/models").json()["loading"] is None
    assert load(server, "two").status_code == 200


def test_without_keys_nobody_loads_and_sighup_does(shop: Shop) -> None:
    shop.refill()
    with ServerProcess("app", "--checkpoint", str(shop.one), "--models-dir", str(shop.models)) as server:
        for answer in (load(server, "one"), server.client.delete("/models/one")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
            assert "admin = true" in answer.json()["error"]["message"]
        shop.put(shop.versions[1], shop.one)
        reload(server, 1)
        assert cards(server)["one"]["checkpoint"] == shop.hashes[1]
        server.terminate()
        assert server.exit_code() == 0


def test_a_drain_ends_a_load_with_an_answer(server: KeyedServer, shop: Shop) -> None:
    shop.put(shop.versions[1], shop.one)
    with work_under_way(server) as running, ThreadPoolExecutor(1) as pool:
        first = pool.submit(load, server, "one")
        wait_for(lambda: server.client.get("/models").json()["loading"] == "one", "the load")
        server.terminate()
        assert (first.result().status_code, first.result().json()["error"]["code"]) == (503, "not_ready")
        assert [work.result().headers["x-ddpm-checkpoint"] for work in running] == [shop.hashes[0]] * 4
        assert server.exit_code() == 0


def test_memory_is_flat_over_many_swaps(shop: Shop) -> None:
    """Of networks so large that ten which stayed would be seen."""
    large = UNetConfig(**{**vars(GREY), "base_channels": 128, "channel_mults": (1, 2), "time_emb_dim": 64})
    versions = [write_checkpoint(shop.folder / f"large-{seed}.safetensors", large, CLASSES, seed) for seed in range(2)]
    served = shop.models / "large.safetensors"
    shop.put(versions[0], served)
    size = versions[0].stat().st_size
    assert size > 7e6
    used: list[float] = []
    with KeyedServer("app", *shop.argv(served), "--max-batch-size", "1", "--micro-batch-size", "1") as server:
        for i in range(20):
            shop.put(versions[1 - i % 2], served)
            assert load(server, "large").json()["checkpoint"] == sha256(versions[1 - i % 2])
            assert generate(server, steps=1).status_code == 200
            used.append(server.metric("process_resident_memory_bytes"))
        assert server.metric("ddpm_model_loads_total", outcome="loaded") == 20
    print("MB", [round(bytes / 1e6) for bytes in used])
    assert max(used[10:]) - max(used[:10]) < 4 * size, [round(bytes / 1e6) for bytes in used]
    served.unlink()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--checkpoint", "mnist,mnist"], "would both be called mnist: name one by NAME=PATH, such as mnist-2="),
        (["--checkpoint", "mnist,"], "must be a checkpoint, or several by commas"),
        (["--checkpoint", "mnist,nowhere.safetensors"], "no checkpoint 'nowhere.safetensors'"),
        (["--models-dir", "nowhere"], "models_dir is nowhere, which is not a folder"),
    ],
)
def test_wrong_settings_are_told(argv: list[str], said: str) -> None:
    ended = run_to_its_end(*argv, "--port", "0")
    assert ended.returncode == 1
    assert ended.stderr.startswith("python -m app: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
