"""API keys: who gets in, how often, how much at once, and what is told about it."""

from __future__ import annotations

import ast
import hashlib
import hmac
import inspect
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from app import auth
from app.__main__ import Server
from app.auth import APIKeyStore
from app.errors import Overloaded, ServiceError, Unauthorized
from app.settings import Settings
from tests.app.conftest import SlowRunner, serving
from tests.app.processes import ROOT, environment, metric, wait_for

ALICE, BOB = "alice-0123456789abcdef", "bob.0123456789~abcdef+/=="
BOTH = f"alice:{ALICE},bob:{BOB}"
WRONG = "wrong-0123456789abcdef"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def table(name: str, *keys: str, **more: int) -> str:
    digests = [hashlib.sha256(key.encode()).hexdigest() for key in keys]
    lines = [f"[{name}]", f"sha256 = {digests!r}", *(f"{field} = {value}" for field, value in more.items())]
    return "\n".join(lines) + "\n"


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/livez", "/readyz", "/health"])
def test_what_tells_nothing_needs_no_key(grey_checkpoint: Path, path: str) -> None:
    with serving(grey_checkpoint, api_keys=BOTH) as client:
        assert client.get(path).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, WRONG, ALICE[:-1], ALICE + "0", ALICE.upper(), "", "é" * 20])
def test_everything_else_needs_one(grey_checkpoint: Path, key: str | None) -> None:
    headers = {} if key is None else {"Authorization": f"Bearer {key}".encode()}
    with serving(grey_checkpoint, api_keys=BOTH) as client:
        for method, path in (
            ("POST", "/generate"), ("GET", "/diffusion-sequence"), ("GET", "/models"), ("GET", "/metrics"),
            ("GET", "/nothing"), ("GET", "/models/"), ("GET", "/livez//"), ("GET", "/LIVEZ"),
            ("GET", "/livez%2f..%2fmodels"),
        ):  # fmt: skip
            answer = client.request(method, path, headers=headers, json={"n": 1} if method == "POST" else None)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
            challenge = answer.headers["www-authenticate"]
            assert challenge == 'Bearer realm="ddpm-serve"' + ("" if key is None else ', error="invalid_token"')
            assert answer.headers["x-request-id"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert not key or key not in answer.text


@pytest.mark.slow
@pytest.mark.parametrize(("key", "name"), [(ALICE, "alice"), (BOB, "bob")])
def test_a_key_opens_and_its_name_is_logged_and_counted(
    grey_checkpoint: Path, caplog: pytest.LogCaptureFixture, key: str, name: str
) -> None:
    with serving(grey_checkpoint, api_keys=BOTH) as client:
        caplog.set_level("INFO", "ddpm.request")
        assert client.post("/generate", json={}, headers=bearer(key)).status_code == 200
        assert vars(caplog.records[-1])["key"] == name
        assert client.post("/generate", json={"n": 0}, headers=bearer(key)).status_code == 422
        text = client.get("/metrics", headers=bearer(key)).text
        assert metric(text, "ddpm_key_requests_total", key=name, outcome="ok") == 1
        assert metric(text, "ddpm_key_requests_total", key=name, outcome="invalid_request") == 1
        assert key not in text
        assert key not in caplog.text


HOSTILE: list[tuple[bytes, ...]] = [
    (f"Bearer {ALICE}".encode(), f"Bearer {ALICE}".encode()),
    (f"Bearer {ALICE}".encode(), b"Bearer x"),
    (f"Bearer {ALICE}, Bearer {BOB}".encode(),),
    (f"Bearer {ALICE},".encode(),),
    (f"Bearer {ALICE} {ALICE}".encode(),),
    (f"Bearer{ALICE}".encode(),),
    (f"Bearer\t{ALICE}".encode(),),
    (f"Basic {ALICE}".encode(),),
    (ALICE.encode(),),
    (f"Bearer {ALICE}\x00".encode(),),
    (f"Bearer {ALICE}\n".encode(),),
    (f'Bearer "{ALICE}"'.encode(),),
    (f"Bearer {ALICE}".replace("a", "\uff41").encode(),),
    (b"Bearer " + b"x" * 100_000,),
    (b"Bearer ",),
    (b"",),
]


@pytest.mark.parametrize("values", HOSTILE)
def test_an_odd_authorization_is_refused(values: tuple[bytes, ...]) -> None:
    keys = APIKeyStore(Settings(api_keys=BOTH))
    with pytest.raises(Unauthorized):
        keys.authenticate([(b"authorization", value) for value in values])


@pytest.mark.parametrize("value", [f"Bearer {ALICE}", f"bearer {ALICE}", f"BEARER   {ALICE}"])
def test_the_scheme_is_of_any_case(value: str) -> None:
    assert APIKeyStore(Settings(api_keys=BOTH)).authenticate([(b"authorization", value.encode())]).name == "alice"


@pytest.mark.parametrize("token", [ALICE, BOB, WRONG])
def test_every_key_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    compared = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    keys = APIKeyStore(Settings(api_keys=BOTH))
    monkeypatch.setattr(auth, "hmac", type("", (), {"compare_digest": staticmethod(compare)}))
    keys.find(token)
    assert compared == [(32, 32), (32, 32)]


def test_secrets_are_compared_by_nothing_else() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(APIKeyStore.find)))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Compare | ast.Break | ast.Return | ast.Dict)][
        1:
    ]


def test_a_minute_holds_as_many_requests_as_it_says() -> None:
    now = 1000.0
    keys = APIKeyStore(Settings(api_keys=BOTH, key_requests_per_minute=30), clock=lambda: now)
    alice, bob = (keys.find(key) for key in (ALICE, BOB))
    assert alice
    assert bob
    for _ in range(30):
        keys.admit(alice).running -= 1
    with pytest.raises(Overloaded, match="30 requests a minute; try again in 2 s") as refused:
        keys.admit(alice)
    assert refused.value.retry_after == 2
    keys.admit(bob)  # who has a bucket of his own
    now += 1.9
    with pytest.raises(Overloaded):
        keys.admit(alice)
    now += 0.2
    keys.admit(alice)
    now += 10_000  # a bucket is never fuller than full
    for _ in range(30):
        keys.admit(alice)
    with pytest.raises(Overloaded):
        keys.admit(alice)


@pytest.mark.slow
def test_a_key_has_only_so_many_requests_under_way(held: SlowRunner, grey_checkpoint: Path) -> None:
    with serving(grey_checkpoint, held, api_keys=BOTH, key_concurrency=1) as client:
        worker = threading.Thread(target=lambda: client.post("/generate", json={"steps": 100}, headers=bearer(ALICE)))
        worker.start()
        wait_for(lambda: metric(client.get("/metrics", headers=bearer(BOB)).text, "ddpm_num_samples_running") > 0)
        answer = client.post("/generate", json={}, headers=bearer(ALICE))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "1"
        assert client.post("/generate", json={"steps": 1}, headers=bearer(BOB)).status_code == 200
        text = client.get("/metrics", headers=bearer(BOB)).text
        assert metric(text, "ddpm_requests_total", endpoint="/generate", outcome="overloaded") == 1
        assert client.get("/no-such-path", headers=bearer(ALICE)).status_code == 429
        text = client.get("/metrics", headers=bearer(BOB)).text
        assert metric(text, "ddpm_requests_total", endpoint="other", outcome="overloaded") == 1
        held.released.set()
        worker.join()
        for _ in range(3):  # every ending gives the place back, an error's too
            assert client.post("/generate", json={"n": 0}, headers=bearer(ALICE)).status_code == 422
        assert client.post("/generate", json={"steps": 1}, headers=bearer(ALICE)).status_code == 200


def test_a_changed_key_file_is_reloaded_unless_it_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", ALICE, requests_per_minute=1))
    keys = APIKeyStore(Settings(api_keys_file=str(path)), clock=lambda: 0.0)
    alice = keys.find(ALICE)
    assert alice
    keys.admit(alice).running -= 1
    assert keys.find(BOB) is None
    path.write_text(table("alice", ALICE, WRONG, requests_per_minute=1) + table("bob", BOB, concurrent=7))
    keys.refresh()
    bob, again = keys.find(BOB), keys.find(WRONG)  # WRONG is alice's new key, beside the old one
    assert bob
    assert again
    assert (bob.name, bob.concurrent) == ("bob", 7)
    with pytest.raises(Overloaded):  # and her minute is still used up
        keys.admit(again)
    for broken in ("[alice", "", table("eve", "x") + "key = 1"):
        path.write_text(broken)
        keys.refresh()
        assert keys.names == ["alice", "bob"]
    path.unlink()
    keys.refresh()
    assert keys.names == ["alice", "bob"]
    path.write_text(table("bob", BOB))
    keys.refresh()
    assert keys.find(ALICE) is None


def test_sighup_reloads_keys_whose_file_looks_the_same(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("alice", ALICE))
    keys = APIKeyStore(Settings(api_keys_file=str(path)))
    seen = path.stat()
    path.write_text(table("peter", ALICE))  # as long
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    keys.refresh()
    assert keys.names == ["alice"]
    models = SimpleNamespace(request_reload=lambda: None)
    Server.request_reload(SimpleNamespace(_keys=keys, _service=SimpleNamespace(models=models)))  # type: ignore[arg-type]
    keys.refresh()
    assert keys.names == ["peter"]


SECRET = "s3cret-s3cret-s3cret"
GOOD = hashlib.sha256(SECRET.encode()).hexdigest()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no keys"),
        (f"[{SECRET}", "is not TOML (at "),
        (f"[a]\nsha256 = '{GOOD}'\n[a]\nsha256 = '{GOOD}'", "is not TOML"),
        (f"a = '{SECRET}'", "entry 1: must be a table [NAME] with sha256"),
        (f"[a]\nkey = '{SECRET}'", "entry 1: must be a table"),
        (f"[a]\nsha256 = '{SECRET}'", "entry 1: sha256 must be 64 hexadecimal digits"),
        ("[a]\nsha256 = []", "entry 1: sha256 must be"),
        (f"[a]\nsha256 = '{GOOD}'\nconcurrent = -1", "entry 1: concurrent must be a whole number"),
        (f"[a]\nsha256 = '{GOOD}'\nrequests_per_minute = true", "entry 1: requests_per_minute must be"),
        (f"[a]\nsha256 = '{GOOD}'\nlimit = 1", "entry 1: must be a table"),
        (f"[a]\nsha256 = '{GOOD}'\nadmin = 'no'", "entry 1: admin must be true or false"),
        (f"[a]\nsha256 = '{GOOD}'\nadmin = 1", "entry 1: admin must be true or false"),
        (f"['{SECRET} ']\nsha256 = '{GOOD}'", "entry 1: a name is"),
        (f"[a]\nsha256 = '{GOOD}'\n[b]\nsha256 = '{GOOD}'", "the same API key is given twice"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_told_without_its_secrets(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"key") as wrong:
        APIKeyStore(Settings(api_keys_file=str(path)))
    assert said in str(wrong.value)
    assert SECRET not in str(wrong.value)
    assert GOOD not in str(wrong.value)
    assert "\n" not in str(wrong.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (SECRET, "entry 1: must be NAME:KEY"),
        (f"a:{ALICE},{SECRET}", "entry 2: must be NAME:KEY"),
        ("a:short", "entry 1: a key is 16 to 512"),
        ("a:", "entry 1: a key is"),
        (f":{SECRET}", "entry 1: a name is"),
        (f"a:{SECRET}é", "entry 1: a key is"),
        (f"a:{SECRET} a:{ALICE}", "the same name"),
        (f"a:{SECRET} b:{SECRET}", "given twice"),
        (",", "no keys"),
    ],
)
def test_a_wrong_variable_is_told_without_its_secrets(value: str, said: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as wrong:
        APIKeyStore(Settings(api_keys=value))
    assert said in str(wrong.value)
    assert SECRET not in str(wrong.value)


def test_settings_do_not_show_keys() -> None:
    assert ALICE not in repr(Settings(api_keys=BOTH))


def test_a_missing_file_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        APIKeyStore(Settings(api_keys_file=str(tmp_path / "none")))


def test_without_keys_nothing_needs_one(client: TestClient) -> None:
    assert client.get("/models").status_code == 200
    assert client.get("/models", headers=bearer("whatever")).status_code == 200


@pytest.mark.slow
def test_the_command_makes_a_key_that_opens(tmp_path: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "app.access", "new", "carol"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    path = tmp_path / "keys.toml"
    path.write_text(made.stdout)
    token = made.stderr.split()[-1]
    assert token not in made.stdout
    found = APIKeyStore(Settings(api_keys_file=str(path))).find(token)
    assert found is not None
    assert found.name == "carol"


def test_unauthorized_is_a_service_error() -> None:
    assert issubclass(Unauthorized, ServiceError)


def test_only_the_file_makes_administrators(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(table("carol", WRONG) + "admin = true\n" + table("dave", WRONG + "0") + "admin = false\n")
    keys = APIKeyStore(Settings(api_keys_file=str(path), api_keys=BOTH))
    found = {token: keys.find(token) for token in (ALICE, BOB, WRONG, WRONG + "0")}
    assert [key.admin for key in found.values() if key] == [False, False, True, False]
