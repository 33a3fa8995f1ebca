"""The Python of the guides runs, as it stands, against a server of digits."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.app.conftest import GREY, write_checkpoint
from tests.app.processes import ROOT, ServerProcess

GUIDE, EDITS = (ROOT / "docs" / "guides" / name for name in ("generate.md", "edit.md"))


@pytest.mark.slow
def test_the_python_of_the_guides_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", GUIDE.read_text())
    (address,) = re.findall(r'src="http://localhost:8000(.*?)"', GUIDE.read_text())
    assert len(blocks) == 3
    assert GUIDE.read_text().index("```python") < GUIDE.read_text().index("```sh"), "it stands first"
    path = write_checkpoint(tmp_path / "mnist.safetensors", replace(GREY, num_classes=10), tuple("0123456789"))
    with ServerProcess("app", "--checkpoint", str(path)) as server:
        names: dict[str, Any] = {}
        for block in blocks:
            exec(block.replace("http://localhost:8000", server.url), names)  # noqa: S102  # what the reader does
        monkeypatch.chdir(tmp_path)
        Pillow.new("L", (28, 28), 200).save("seven.png")
        (edit,) = re.findall(r"(?ms)^```python\n(.*?)^```", EDITS.read_text())
        edited: dict[str, Any] = {}
        exec(edit.replace("http://localhost:8000", server.url), edited)  # noqa: S102
        edited["client"].close()
        assert server.client.get(address, follow_redirects=True).headers["content-type"] == "image/png"
    names["client"].close()
    assert np.asarray(edited["two"])[:4].tolist() == [[200] * 12] * 4, "what the mask keeps"
    assert isinstance(names["image"], Pillow.Image)
    assert names["image"].size == (12, 8)
    assert names["images"].shape == (4, 8, 12)
    assert names["images"].dtype == np.uint8
    kinds = [line.split()[0].rpartition(".")[2] for line in capsys.readouterr().out.splitlines()]
    assert kinds == ["partial_image"] * 3 + ["completed"]
