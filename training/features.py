"""A file of float32 rows that grows batch by batch, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class FeatureFile:
    """Rows [N, columns] beside `out`: a line of JSON, the `key`, then the numbers as they are in memory.

    Its name holds a hash of the key, which names everything that determines the rows: other settings, another file.
    `count` rows are there, whole batches of `batch_size`; what a crash left of one is overwritten.
    """

    def __init__(self, out: Path, key: dict[str, Any], columns: int, batch_size: int) -> None:
        header = json.dumps(key | {"columns": columns}, sort_keys=True).encode() + b"\n"
        self.path = out.with_name(f"{out.stem}-{hashlib.sha256(header).hexdigest()[:12]}.features")
        self.columns, self._begin = columns, len(header)
        if not self.path.exists() or self.path.stat().st_size < len(header):
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
        return self._begin + 4 * self.columns * self.count

    def append(self, rows: Tensor) -> None:
        """Adds rows [batch_size, columns]. Raises OSError where the file is not as this object left it."""
        data = rows.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes()
        with self.path.open("ab") as file:
            if file.tell() != self._end:
                raise OSError(f"{self.path} has changed: is the same command running twice?")
            file.write(data)
        self.count += len(rows)

    def read(self) -> Tensor:
        """All rows, float32 [count, columns]."""
        with self.path.open("rb") as file:
            file.seek(self._begin)
            rows = np.fromfile(file, "<f4", self.count * self.columns)
        return torch.from_numpy(rows.astype(np.float32, copy=False)).reshape(-1, self.columns)
