import pytest
import torch

from training.memory import memory_for


def test_a_lack_of_memory_is_a_sentence_with_advice() -> None:
    with (
        pytest.raises(ValueError, match=r"for the images \(it asked for 4194304\.0 GiB more\): buy some"),
        memory_for("the images", "buy some"),
    ):
        torch.empty(2**52, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a …"), "asked for 2.50 GiB"),
        (MemoryError(), "for a step: less"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "for a step: less"),
    ],
)
def test_every_way_to_say_it_is_understood(error: BaseException, said: str) -> None:
    with pytest.raises(ValueError, match=said), memory_for("a step", "less"):
        raise error


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_for("a step", "less"):
        raise RuntimeError("shapes do not go together")
