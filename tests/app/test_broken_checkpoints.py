"""Files that are damaged, dishonest or hostile, for a server that starts and for one that serves: refused in a
sentence, nothing is executed, and what is served stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.main import create_app
from app.settings import Settings
from model.checkpoint import CheckpointError
from tests.app.processes import run_to_its_end
from tests.app.test_model_registry import KeyedServer, Shop, generate, load, loads
from tests.model.broken import BROKEN, NOT_READABLE, flipped, hostile


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def server(shop: Shop) -> Iterator[KeyedServer]:
    with KeyedServer("app", *shop.argv(shop.one)) as server:
        yield server


@pytest.fixture(scope="module")
def picture(server: KeyedServer) -> bytes:
    """What the server makes of its first checkpoint."""
    return generate(server, n=2, seed=1).content


def write(path: Path, content: bytes) -> None:
    """In place of whatever is there."""
    part = path.with_suffix(".part")
    part.write_bytes(content)
    os.replace(part, path)


def assert_kept(server: KeyedServer, said: str, shop: Shop, picture: bytes) -> None:
    """The file of `one` is refused in one sentence, and the server goes on as if nothing had been."""
    before = loads(server, "one").get("invalid_checkpoint", 0)
    refused = load(server, "one")
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_checkpoint")
    message = refused.json()["error"]["message"]
    assert said in message
    assert "\n" not in message
    assert str(shop.folder) not in message
    assert generate(server, n=2, seed=1).content == picture
    assert server.client.get("/readyz").status_code == 200
    assert loads(server, "one") == {"invalid_checkpoint": before + 1}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_nothing_broken_takes_the_place_of_what_is_served(
    server: KeyedServer, shop: Shop, picture: bytes, case: str
) -> None:
    broken, said = BROKEN[case]
    write(shop.one, broken(shop.versions[1].read_bytes()))
    assert_kept(server, said, shop, picture)


def test_a_pickle_is_not_run_by_a_server(server: KeyedServer, shop: Shop, picture: bytes) -> None:
    trace = shop.folder / "trace"
    for content in hostile(trace).values():
        write(shop.one, content)
        assert_kept(server, NOT_READABLE, shop, picture)
    assert not trace.exists()


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing"])
def test_a_path_that_is_no_file_does_not_replace_the_model(
    server: KeyedServer, shop: Shop, picture: bytes, kind: str
) -> None:
    shop.one.unlink(missing_ok=True)
    if kind == "folder":
        shop.one.mkdir()
    elif kind == "pipe":
        os.mkfifo(shop.one)  # to open it would be to wait for ever
    else:
        shop.one.symlink_to(shop.folder / "nowhere")
    try:
        assert_kept(server, "no checkpoint 'one': ", shop, picture)
    finally:
        shop.one.rmdir() if kind == "folder" else shop.one.unlink()


def test_a_server_that_refused_them_all_takes_a_good_one(server: KeyedServer, shop: Shop, picture: bytes) -> None:
    shop.put(shop.versions[1], shop.one)
    assert load(server, "one").json()["checkpoint"] == shop.hashes[1]
    assert generate(server, n=2, seed=1).content != picture


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_a_server_does_not_start_with_what_is_broken(grey_checkpoint: Path, tmp_path: Path, case: str) -> None:
    """`python -m app` exits with what is raised here."""
    path = tmp_path / "broken.safetensors"
    broken, said = BROKEN[case]
    path.write_bytes(broken(grey_checkpoint.read_bytes()))
    with pytest.raises(CheckpointError) as refused:
        create_app(Settings(checkpoint=str(path), device="cpu", threads=1))
    assert said in str(refused.value)
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_process_ends_with_a_sentence_and_runs_nothing(grey_checkpoint: Path, tmp_path: Path) -> None:
    """The rest of its start is tested beside others, in test_server.py."""
    trace, path = tmp_path / "trace", tmp_path / "broken.safetensors"
    good = grey_checkpoint.read_bytes()
    for content, fresh in ((hostile(trace)["a .pt"], True), (flipped(good, len(good) - 2, 0), False)):
        path.write_bytes(content)
        ended = run_to_its_end("--checkpoint", str(path), "--port", "0", fresh=fresh)
        assert ended.returncode == 1
        assert ended.stderr.startswith(f"python -m app: {path}")
        assert ended.stderr.count("\n") == 1
        assert ended.stdout == ""
    assert not trace.exists()
