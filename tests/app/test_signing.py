"""Signed addresses: good until they expire, for what was signed, and for nothing else."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest

from app import sign
from app.errors import Forbidden
from app.settings import Settings
from app.signing import YEAR_S, AddressSigner, ImageAccess, image_access

SECRET = "0123456789abcdef" * 4
SHORT = "/images/mnist/7/1/6.png?steps=5"


def signer(now: float = 1000.0, secret: str = SECRET) -> AddressSigner:
    return AddressSigner(secret, lambda: now)


def check(address: str, now: float = 1000.0, secret: str = SECRET) -> int:
    parts = urlsplit(address)
    return signer(now, secret).check(parts.path, parse_qsl(parts.query, True))


def test_a_signature_is_good_until_it_expires() -> None:
    address = signer().sign(SHORT, 60)
    assert address.startswith(SHORT + "&expires=1060&signature=")
    assert check(address) == 60
    assert check(address, now=1059.9) == 1
    with pytest.raises(Forbidden, match="has expired"):
        check(address, now=1060)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("/7/", "/8/"),
        ("6.png", "6.gif"),
        ("steps=5", "steps=50"),
        ("steps=5&", ""),
        ("expires=1060", "expires=9999"),
        ("expires=1060", "expires=01060"),
        ("&expires=1060", ""),
        ("&expires=1060", "&expires=1060&expires=9999"),
        ("&signature=", "&size=99x99&signature="),
        ("&signature=", "&signature=0"),
        ("&signature=", "&signature=&signature="),
        ("&signature=", "&signature=\u00e4"),
    ],
)
def test_a_changed_address_is_refused(old: str, new: str) -> None:
    address = signer().sign(SHORT, 60)
    assert old in address
    with pytest.raises(Forbidden, match="does not fit"):
        check(address.replace(old, new))


def test_another_secret_is_refused() -> None:
    with pytest.raises(Forbidden, match="does not fit"):
        check(signer().sign(SHORT, 60), secret="x" * 32)


def test_order_encoding_and_a_proxys_prefix_do_not_matter() -> None:
    address = signer().sign("https://a.example/prefix/images/m/K%C3%A4fer/1/6.png?guidance_interval=0%2C1&steps=5", 60)
    parts = urlsplit(address)
    assert parts.netloc == "a.example"
    query = parse_qsl(parts.query)
    signer().check("/images/m/Käfer/1/6.png", query[::-1])
    with pytest.raises(Forbidden):
        signer().check("/images/m/Kafer/1/6.png", query)


def test_signing_again_replaces_the_signature() -> None:
    assert signer().sign(signer().sign(SHORT, 5), 60) == signer().sign(SHORT, 60)


@pytest.mark.parametrize(("address", "valid"), [("/generate", 60), (SHORT, 0), (SHORT, 10**10), ("", 1)])
def test_what_cannot_be_signed_is_refused(address: str, valid: int) -> None:
    with pytest.raises(ValueError, match="address"):
        signer().sign(address, valid)


def test_a_weak_or_unreadable_secret_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff" * 40)
    for settings, said in (
        (Settings(signing_key="short"), "has 5 characters; it needs 32"),
        (Settings(signing_key_file=str(tmp_path / "none")), "cannot be read: No such file"),
        (Settings(signing_key_file=str(tmp_path / "empty")), "is empty"),
        (Settings(signing_key_file=str(tmp_path / "binary")), "is not UTF-8"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            image_access(settings, True)
        assert "short" not in str(refused.value)


@pytest.mark.parametrize(
    ("access", "is_open", "control"),
    [
        (ImageAccess(), True, "public"),
        (ImageAccess(keys_required=True), False, "private"),
        (ImageAccess(keys_required=True, is_public=True), True, "public"),
        (ImageAccess(keys_required=True, signer=signer()), False, "private"),
    ],
)
def test_keys_make_answers_private(access: ImageAccess, is_open: bool, control: str) -> None:
    path, _, query = SHORT.partition("?")
    assert access.is_open(path, query.encode()) is is_open
    assert access.cache_control(path, query.encode()) == f"{control}, max-age={YEAR_S}, immutable"
    assert access.is_open("/generate", b"") is False


def test_a_signed_address_is_public_while_it_is_good() -> None:
    path, _, query = signer().sign(SHORT, 60).partition("?")
    access = ImageAccess(keys_required=True, signer=signer())
    assert access.is_open(path, query.encode())
    assert access.cache_control(path, query.encode()) == "public, max-age=60, immutable"
    with pytest.raises(Forbidden, match="has no signing key"):
        ImageAccess(keys_required=True).is_open(path, query.encode())


def test_links_are_signed_where_they_would_need_a_key() -> None:
    assert "signature=" in ImageAccess(True, False, signer()).link(SHORT)
    for access in (ImageAccess(True), ImageAccess(True, True, signer()), ImageAccess(False, False, signer())):
        assert access.link(SHORT) == SHORT


def test_the_command_signs_with_the_servers_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "signing.key"
    key.write_text(SECRET + "\n")
    sign.main(["--signing-key-file", str(key), "--valid", "2h", SHORT, "https://a.example" + SHORT])
    first, second = capsys.readouterr().out.splitlines()
    access = image_access(Settings(signing_key_file=str(key)), True)
    assert access.is_open(SHORT.partition("?")[0], first.partition("?")[2].encode())
    assert access.signer is not None
    assert 7100 < access.signer.check(SHORT.partition("?")[0], parse_qsl(urlsplit(second).query)) <= 7200


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([SHORT], "there is no signing key"),
        ([SHORT, "--signing-key-file", "/nowhere"], "cannot be read"),
        (["/models", "--signing-key-file", "KEY"], "is not the address of an image"),
        ([SHORT, "--valid", "soon"], "'soon' is no time: write 3600, 60m, 24h or 7d"),
    ],
)
def test_the_command_refuses_in_a_sentence(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text(SECRET)
    with pytest.raises(SystemExit) as ended:
        sign.main([str(tmp_path / "key") if word == "KEY" else word for word in argv])
    assert said in str(ended.value) + capsys.readouterr().err
