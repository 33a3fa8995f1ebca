"""A file appears whole or not at all, with the mode of the umask, and on the disk before it has its name."""

import errno
import os
import stat
from pathlib import Path

import pytest

from model.atomic_write import atomic_write, put_in_place

Capsys = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "some.bin").write_bytes(b"old")
    return tmp_path / "some.bin"


def test_the_file_changes_when_the_block_ends(path: Path) -> None:
    with atomic_write(path) as part:
        part.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("full"), RuntimeError("full"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_old_file(path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_write(path) as part:  # noqa: PT012
        part.write_bytes(b"half")
        raise error
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_file_do_not_mix(path: Path) -> None:
    with atomic_write(path) as first:
        first.write_bytes(b"first")
        with atomic_write(path) as second:
            second.write_bytes(b"2nd")
        assert path.read_bytes() == b"2nd"
    assert path.read_bytes() == b"first"


def test_the_mode_is_the_umasks_whatever_the_block_sets(path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_write(path) as part:
            part.unlink()  # as safetensors does, which makes another that only its owner can read
            part.touch(0o600)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_contents_reach_the_disk_before_the_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def sync(file: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}"))
        events.append("folder" if name == path.parent else f"contents {name.read_bytes()!r}")
        fsync(file)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("name"), replace(a, b)))
    with atomic_write(path) as part:
        part.write_bytes(b"new")
    assert events == ["contents b'new'", "name", "folder"]


def test_a_folder_is_put_in_place_whole(path: Path) -> None:
    part = path.parent / "run.part"
    part.mkdir()
    (part / "config.json").write_text("{}")
    put_in_place(part, path.parent / "run")
    assert (path.parent / "run" / "config.json").read_text() == "{}"
    assert not part.exists()


def test_a_file_system_without_fsync_warns_once(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capsys) -> None:
    def unknown(_: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", unknown)
    for name in ("some.bin", "other.bin"):
        with atomic_write(path.with_name(name)) as part:
            part.write_bytes(b"new")
        assert path.with_name(name).read_bytes() == b"new"
    sentence = (
        "its file system does not tell when a file is on the disk (Invalid argument): a power failure may lose files"
    )
    assert capsys.readouterr().err == f"{path.parent}: {sentence}\n"


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_at_fsync_keeps_the_old_file(code: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match=os.strerror(code)), atomic_write(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "some.bin"):
        pass


def test_a_full_disk_is_said_with_the_file(path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, atomic_write(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert str(caught.value).endswith(f": '{path}'")
    with pytest.raises(OSError, match=r"^cannot save$"), atomic_write(path):
        raise OSError("cannot save")
