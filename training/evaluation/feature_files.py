"""Files of float32 rows: those of samples grow batch by batch, those of real images serve all evaluations."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.atomic_write import atomic_write, naming
from training.data import Images
from training.evaluation.feature_extractor import FeatureExtractor

BATCH_SIZE = 500  # real images in one call of the extractor


class FeatureFile:
    """Rows [N, columns] beside `out`: a line of JSON, the `key`, then the numbers as they are in memory.

    Its name holds a hash of the key, which names everything that determines the rows: other settings, another file.
    `count` rows are there, whole batches of `batch_size`; what a crash left of one is overwritten.
    """

    def __init__(self, out: Path, key: dict[str, Any], columns: int, batch_size: int) -> None:
        header = json.dumps(key | {"columns": columns}, sort_keys=True).encode() + b"\n"
        self.path = out.with_name(f"{out.stem}-{hashlib.sha256(header).hexdigest()[:12]}.features")
        self.columns, self.begin = columns, len(header)
        if not self.path.exists() or self.path.stat().st_size < len(header):
            with naming(self.path):
                self.path.write_bytes(header)
        with self.path.open("rb") as file:
            if file.read(len(header)) != header:
                raise FileExistsError(f"{self.path} is something else: move it away")
        batches = (self.path.stat().st_size - len(header)) // (4 * columns * batch_size)
        self.count = batches * batch_size
        with self.path.open("r+b") as file:
            file.truncate(self._end)

    @property
    def _end(self) -> int:
        return self.begin + 4 * self.columns * self.count

    def append(self, rows: Tensor) -> None:
        """Adds rows [batch_size, columns]. Raises OSError where the file is not as this object left it."""
        data = rows.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()
        with naming(self.path), self.path.open("ab") as file:
            if file.tell() != self._end:
                raise OSError(f"{self.path} has changed: is the same command running twice?")
            file.write(data)
        self.count += len(rows)

    def read(self) -> Tensor:
        """All rows, float32 [count, columns]."""
        with self.path.open("rb") as file:
            file.seek(self.begin)
            rows = np.fromfile(file, "<f4", self.count * self.columns)
        return torch.from_numpy(rows.astype(np.float32, copy=False)).reshape(-1, self.columns)


def real_features(extractor: FeatureExtractor, images: Images) -> Tensor:
    """What the extractor makes of every image of a split: features and logits, float32 [N, F + K] on the CPU, in order.

    It is kept in a file beside the extractor's, one for each split: 4·(F + K) bytes for an image. Other images have
    another file; another extractor of that name, or device, or torch, writes over it. Where it cannot be written,
    nothing is kept, and a line says so.
    """
    hashed = hashlib.sha256(str(tuple(images.images.shape)).encode())
    hashed.update(images.images.cpu().numpy())  # not copied: it may be a file that is mapped
    digest = hashed.hexdigest()
    path = extractor.path.with_name(f"{extractor.path.stem}-{digest[:12]}.real")
    shape = (len(images), extractor.size + len(extractor.class_names))
    key = {
        "extractor": extractor.sha256,
        "images": digest,
        "shape": shape,
        "torch": torch.__version__,
        "device": extractor.device.type,
    }
    header = json.dumps(key).encode() + b"\n"
    try:
        with path.open("rb") as file:
            if file.read(len(header)) == header:
                kept = np.fromfile(file, "<f4")
                if kept.size == shape[0] * shape[1]:
                    return torch.from_numpy(kept.astype(np.float32, copy=False)).reshape(shape)
    except FileNotFoundError:
        pass
    parts = images.images.split(BATCH_SIZE)
    bar = tqdm(parts, desc="real images", unit_scale=BATCH_SIZE, unit="image", leave=False)
    rows = torch.cat([torch.cat(extractor.network.extract(part), dim=1).cpu() for part in bar])
    try:
        with atomic_write(path) as part:
            part.write_bytes(header + rows.numpy().astype("<f4", copy=False).tobytes())
    except OSError as error:
        print(f"What the classifier says of real images is not kept: {error}", file=sys.stderr)
    return rows
