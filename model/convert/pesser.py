"""Weights of pesser/pytorch_diffusion: Ho et al.'s own, which were TensorFlow's."""

from __future__ import annotations

from model.convert.ermongroup import network_by_flags
from model.convert.layout import Flags, Imported, Weights


def import_pesser(state: Weights, flags: Flags) -> Imported:
    """`model-790000.ckpt`: a network's tensors, averaged or not, which only the file's name tells."""
    return Imported(*network_by_flags(state, flags), "by flags, since such a file has none")
