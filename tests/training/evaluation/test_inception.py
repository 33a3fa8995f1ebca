from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from training import evaluate
from training.evaluation import feature_extractor, inception
from training.evaluation.inception import Inception


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Those of a network that knows nothing, with the parts of the real file that are not used."""
    torch.manual_seed(0)
    network = Inception()
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    return state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture
def file(tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The weights' file, taken for the real one."""
    path = tmp_path / "pt_inception.pth"
    torch.save(weights, path)
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    return path


def test_parameters_are_as_many_as_published(weights: dict[str, torch.Tensor]) -> None:
    # Inception-v3 without its auxiliary and its last layer: torchvision's 27,161,264 - 3,326,696 - 2,049,000
    assert sum(p.numel() for p in Inception().parameters()) == 21_785_568
    assert weights["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)


def test_pooling_leaves_out_the_padding(weights: dict[str, torch.Tensor]) -> None:
    block = inception.block_a(4, 2)
    block.branch_pool = nn.Identity()
    pooled = block(torch.ones(1, 4, 5, 5))[:, -4:]
    torch.testing.assert_close(pooled, torch.ones(1, 4, 5, 5))


def test_features_are_of_bytes_grey_or_in_colour(
    weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inception, "SIDE", 75)
    network = inception.from_state(weights)
    images = torch.randint(0, 256, (2, 1, 8, 10), dtype=torch.uint8)
    features, logits = network.extract(images)
    assert features.shape == (2, 2048)
    assert logits.shape == (2, 0)
    torch.testing.assert_close(network.extract(images.expand(-1, 3, -1, -1))[0], features)
    torch.testing.assert_close(network(images.expand(-1, 3, -1, -1) / 127.5 - 1), features)
    assert not torch.equal(features[0], features[1])


@pytest.mark.slow
def test_only_the_real_weights_are_inception(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert feature_extractor.load(file).name == "inception"
    monkeypatch.undo()
    with pytest.raises(
        feature_extractor.FeatureExtractorError,
        match=r"not the Inception of FID: its sha256 begins with .*, not 6726825d",
    ):
        feature_extractor.load(file)
    with pytest.raises(feature_extractor.FeatureExtractorError, match=r"none\.pth"):
        feature_extractor.load(tmp_path / "none.pth")


@pytest.mark.slow
def test_distances_in_its_features_are_fid_and_kid(
    file: Path,
    evaluation: list[str],
    evaluated: Callable[..., dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Inception.forward  # 2048 features of 299 × 299 pixels would take minutes
    monkeypatch.setattr(inception, "SIDE", 75)
    monkeypatch.setattr(inception, "FEATURES", 24)
    monkeypatch.setattr(Inception, "forward", lambda self, x: whole(self, x)[:, :24])
    by_classifier = evaluated(evaluation)
    assert "fid" not in json.dumps(by_classifier)
    result = evaluated([*evaluation, "--features", str(file), "--out", str(tmp_path / "fid.json")])
    for name in ("generated", "test"):
        assert result[name].keys() == {"fid", "fid_all_train", "kid", "kid_std", "precision", "recall"}
        assert result[name]["fid"] > 0
    assert result["fid_ratio"] == pytest.approx(result["generated"]["fid"] / result["test"]["fid"])
    assert result["features"] == {"name": "inception", "sha256": feature_extractor.load(file).sha256, "size": 24}
    assert "in the features of inception,\n" in evaluate.table(result)
