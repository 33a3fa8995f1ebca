"""Files that are nearly checkpoints, loaded into a server that serves a good one."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import pickle
import random
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from tests.app.processes import ServerProcess
from tests.stress.checkpoint_changes import PICKLE
from tests.stress.load_generator import CANARY
from tests.stress.resources import Findings, ResourceSnapshot

ADMIN = "stress-0123456789abcdef"
MODEL = "corrupt"
INVALID_VALUES: list[object] = [
    -1, 0, 2**31, 2**63, 10**30, 1.5, float("nan"), float("inf"), True, None, "", "x", "\ud800", "a\r\nb: c", "\0",
    [], {}, [10**9, 10**9], ["x", "x", "x"],
]  # fmt: skip
REFUSALS = {"invalid_checkpoint", "load_failed", "out_of_memory"}


def take_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its numbers."""
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def put_together(header: dict[str, Any], numbers: bytes) -> bytes:
    """The inverse of `take_apart`."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def flipped(content: bytes, rng: random.Random) -> bytes:
    """In the header or the weights."""
    data = bytearray(content)
    end = rng.choice([8, 2000, len(data)])
    for _ in range(rng.choice([1, 1, 8])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def wrong_size(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice([0, 1, len(content), 2**31, 2**40, 2**63, 2**64 - 1, rng.randrange(2**64)])
    return struct.pack("<Q", size) + content[8:]


def wrong_tensor(content: bytes, rng: random.Random) -> bytes:
    """A shape, a type or a place that is not the tensor's; or a tensor too many, or none."""
    header, numbers = take_apart(content)
    name = rng.choice([name for name in header if name != "__metadata__"])
    tensor = header[name]
    begin, end = tensor["data_offsets"]
    change = rng.randrange(6)
    if change == 0:
        tensor["shape"] = rng.choice([[], [0], [2**40], [2**32, 2**32], [-1], [*tensor["shape"], 1], ["6"], [1.5]])
    elif change == 1:
        tensor["dtype"] = rng.choice(["F64", "F16", "BF16", "I64", "BOOL", "U8", "F8_E4M3", "X", "", None])
    elif change == 2:
        tensor["data_offsets"] = rng.choice(
            [[0, 2**63], [end, begin], [begin, end - 1], [begin + 1, end + 1], [-4, end], [0, 0], [], None]
        )
    elif change == 3:
        del header[name]
    elif change == 4:
        header["one.too.many"] = copy.deepcopy(tensor)
    else:
        header[name] = rng.choice([None, [], 1, "x", {}, {"dtype": "F32"}])
    return put_together(header, numbers)


def wrong_config(content: bytes, rng: random.Random) -> bytes:
    """A configuration that lies about one thing."""
    header, numbers = take_apart(content)
    config = json.loads(header["__metadata__"]["ddpm"])
    del config["sha256"]  # a liar would make another one
    place: Any = config
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], dict | list) and place[key]) or rng.random() < 0.1:
            break
        place = place[key]
    if rng.random() < 0.1:
        del place[key]
    else:
        place[key] = rng.choice(INVALID_VALUES)
    header["__metadata__"]["ddpm"] = json.dumps(config)
    return put_together(header, numbers)


def wrong_metadata(content: bytes, rng: random.Random) -> bytes:
    header, numbers = take_apart(content)
    metadata: list[object] = ["", "{", "[" * 100_000, "null", "1e999", '{"format": "ddpm-serve/1"}', '"x"', "\x00", 7]
    header["__metadata__"] = rng.choice([{"ddpm": rng.choice(metadata)}, {}, None, [], "x"])
    return put_together(header, numbers)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pickles(marker: Path) -> list[bytes]:
    """What `torch.load` or `pickle.load` would run."""
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save(Payload(str(marker)), zipped)
    torch.save(Payload(str(marker)), old, _use_new_zipfile_serialization=False)
    return [zipped.getvalue(), old.getvalue(), pickle.dumps(Payload(str(marker))), PICKLE]


def noise(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", rng.randbytes(7), rng.randbytes(100_000), content + b"\0", content * 2, content[::-1]])


Corruption = Callable[[bytes, random.Random], bytes]
CORRUPTIONS: list[Corruption] = [truncated, flipped, wrong_size, wrong_tensor, wrong_config, wrong_metadata, noise]


def settings(folder: Path) -> list[str]:
    """Flags for a server into which an administrator may load what lies in `folder`/models."""
    keys = folder / "keys.toml"
    keys.write_text(f'[stress]\nsha256 = "{hashlib.sha256(ADMIN.encode()).hexdigest()}"\nadmin = true\n')
    (folder / "models").mkdir()
    return ["--models-dir", str(folder / "models"), "--api-keys-file", str(keys)]


def _same(one: Path, other: Path) -> bool:
    """Whether nothing of it is lost: a flipped bit in the name of the digest's field does no harm by itself."""
    a, b = checkpoint.load(one), checkpoint.load(other)
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return a.config == b.config and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def fuzz_checkpoints(server: ServerProcess, folder: Path, good: Path, number: int, seed: int = 0) -> Findings:
    """So many files, one after another, to a server with `settings(folder)`: refused with a sentence, and the model
    that is served goes on. What is a whole checkpoint in spite of all is loaded, used and taken away."""
    findings, rng = Findings(), random.Random(seed)
    content, marker = good.read_bytes(), folder / "executed"
    disguised = pickles(marker)
    path = folder / "models" / f"{MODEL}.safetensors"
    client = server.client
    client.headers["Authorization"] = f"Bearer {ADMIN}"
    canary = client.post("/generate", json=CANARY).content
    sentences: Counter[str] = Counter()
    snapshot = ResourceSnapshot(server)
    for i in range(number):
        if i % 10 == 9:
            kind, corrupted = "pickle", rng.choice([*disguised, *(data + content for data in disguised)])
        else:
            corrupt = rng.choice(CORRUPTIONS)
            kind, corrupted = corrupt.__name__, corrupt(content, rng)
        part = path.with_suffix(".part")
        part.write_bytes(corrupted)
        os.replace(part, path)
        answer = client.post("/models", json={"name": MODEL})
        outcome = "loaded" if answer.status_code == 200 else answer.json()["error"]["code"]
        findings.outcomes[kind.replace("_", " "), outcome] += 1
        if outcome == "loaded":
            used = client.post("/generate", json=CANARY | {"model": MODEL})
            listed = client.get("/models")
            # Its numbers may be out of all range, or its class not there.
            honest = used.status_code == 200 or used.json()["error"]["code"] in ("step_failed", "invalid_class_label")
            if not honest or listed.status_code != 200:
                findings.wrong.append(
                    f"{i} ({kind}) was loaded: {used.status_code} {used.text[:99]}, {listed.text[:99]}"
                )
            if kind != "wrong_config" and not _same(path, good):
                findings.wrong.append(f"{i} ({kind}) was loaded")
            client.delete(f"/models/{MODEL}")
        else:
            said = answer.json()["error"]["message"]
            sentences[said] += 1
            if outcome not in REFUSALS or len(said) < 20 or str(folder) in said:
                findings.wrong.append(f"{i} ({kind}): {answer.status_code} {outcome}, {said!r}")
        if i % 10 == 0:
            snapshot.sample_memory()
            if client.get("/readyz").status_code != 200 or client.post("/generate", json=CANARY).content != canary:
                findings.wrong.append(f"after {i} ({kind}) the good model does not serve as before")
    if marker.exists():
        findings.wrong.append("a pickle was executed")
    snapshot.compare(findings)
    findings.numbers |= {"different sentences of refusal": len(sentences)}
    return findings
