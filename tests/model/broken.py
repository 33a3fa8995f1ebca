"""Files that are damaged, dishonest or hostile, made from a good checkpoint: none of them may be loaded."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HUGE = {
    "base_channels": 4096,
    "channel_mults": [64] * 8,
    "num_res_blocks": 16,
    "attention_levels": list(range(8)),
    "time_emb_dim": 16384,
}  # some 10¹⁴ weights


class Evil:
    """A pickle that would leave a trace if anyone opened it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


def zipped(trace: Path) -> bytes:
    """What torch.save makes of such a pickle."""
    content = io.BytesIO()
    torch.save({"x": Evil(trace)}, content)
    return content.getvalue()


def parts(good: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and its data."""
    (length,) = struct.unpack_from("<Q", good)
    return json.loads(good[8 : 8 + length]), good[8 + length :]


def joined(header: dict[str, Any], data: bytes) -> bytes:
    """The file of a header and its data."""
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def flipped(good: bytes, byte: int, bit: int) -> bytes:
    """The file with one bit changed."""
    return good[:byte] + bytes([good[byte] ^ 1 << bit]) + good[byte + 1 :]


def after(mark: bytes, bit: int = 0) -> Callable[[bytes], bytes]:
    """One bit changed in the byte after this text."""
    return lambda good: flipped(good, good.index(mark) + len(mark), bit)


def tensors(header: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the header, in the order of their data."""
    return sorted((entry for name, entry in header.items() if name != "__metadata__"), key=lambda e: e["data_offsets"])


def lying(change: Callable[[list[dict[str, Any]]], object]) -> Callable[[bytes], bytes]:
    """A header whose entries for tensors are changed."""

    def lie(good: bytes) -> bytes:
        header, data = parts(good)
        change(tensors(header))
        return joined(header, data)

    return lie


def without_digest(part: str, values: dict[str, Any]) -> Callable[[bytes], bytes]:
    """A configuration that is changed, in a file that says nothing of its contents."""

    def change(good: bytes) -> bytes:
        header, data = parts(good)
        config = json.loads(header["__metadata__"]["ddpm"])
        del config["sha256"]
        config[part].update(values)
        header["__metadata__"]["ddpm"] = json.dumps(config)
        return joined(header, data)

    return change


def terabytes(good: bytes) -> bytes:
    """A tensor of 4 TB in a file of kilobytes."""
    header, data = parts(good)
    header["out_conv.bias"] |= {"shape": [10**12], "data_offsets": [0, 4 * 10**12]}
    return joined({name: header[name] for name in ("__metadata__", "out_conv.bias")}, data)


NOT_READABLE = "is not a readable safetensors file"
DAMAGED = "its contents are not those that it was saved with"

BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda good: b"", NOT_READABLE),
    "seven bytes": (lambda good: good[:7], NOT_READABLE),
    "cut in the header": (lambda good: good[:100], NOT_READABLE),
    "cut in the middle": (lambda good: good[: len(good) // 2], NOT_READABLE),
    "without its last byte": (lambda good: good[:-1], NOT_READABLE),
    "with a byte more": (lambda good: good + b"\0", NOT_READABLE),
    "zeros": (lambda good: bytes(len(good)), NOT_READABLE),
    "an error page": (lambda good: b"<!DOCTYPE html>\n<title>404 Not Found</title>\n", NOT_READABLE),
    "a git-lfs pointer": (lambda good: b"version https://git-lfs.github.com/spec/v1\n", NOT_READABLE),
    "a flip in the header's length": (lambda good: flipped(good, 1, 0), NOT_READABLE),
    "a flip in the header's syntax": (lambda good: flipped(good, 8, 1), NOT_READABLE),
    "a flip in a tensor's name": (after(b'"out_conv.b'), "1 tensors are missing, 'out_conv.bias'"),
    "a flip in a class's name": (after(b'\\"class_names\\": [\\"'), DAMAGED),
    "a flip in the digest": (after(b'\\"sha256\\": \\"'), DAMAGED),
    "a flip in a first weight": (lambda good: flipped(good, len(good) - len(parts(good)[1]), 0), DAMAGED),
    "a flip in the last weight": (lambda good: flipped(good, len(good) - 2, 3), DAMAGED),
    "tensors that overlap": (lying(lambda t: t[1].update(data_offsets=t[0]["data_offsets"])), NOT_READABLE),
    "tensors beyond the file": (lying(lambda t: t[-1].update(data_offsets=[10**9, 10**9 + 4])), NOT_READABLE),
    "a tensor that ends before it begins": (
        lying(lambda t: t[-1].update(data_offsets=t[-1]["data_offsets"][::-1])),
        NOT_READABLE,
    ),
    "a negative offset": (lying(lambda t: t[0].update(data_offsets=[-4, 0])), NOT_READABLE),
    "a negative shape": (lying(lambda t: t[0].update(shape=[-1])), NOT_READABLE),
    "a shape that overflows": (lying(lambda t: t[0].update(shape=[2**32, 2**32, 2**32])), NOT_READABLE),
    "terabytes": (terabytes, NOT_READABLE),
    "a header of 2⁶² bytes": (lambda good: struct.pack("<Q", 2**62) + good[8:], NOT_READABLE),
    "a wider type": (lying(lambda t: t[0].update(dtype="F64")), NOT_READABLE),
    "an unknown type": (lying(lambda t: t[0].update(dtype="F33")), NOT_READABLE),
    "whole numbers": (lying(lambda t: t[0].update(dtype="I32")), DAMAGED),
    "a network of 10¹⁴ weights": (without_digest("unet", HUGE), "tensors are missing"),
    "an image of 10⁹ channels": (without_digest("unet", {"image_channels": 10**9}), "image_channels must be"),
}


def hostile(trace: Path) -> dict[str, bytes]:
    """Files that would leave a trace if they were unpickled."""
    return {"a pickle": pickle.dumps(Evil(trace)), "a .pt": zipped(trace)}
