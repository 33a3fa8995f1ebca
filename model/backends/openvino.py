"""OpenVINO as the runtime of a network on a CPU (extra `openvino`)."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from model.diffusion import Network
from model.nn.networks import AnyUNet

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


def compile_openvino(network: AnyUNet, precision: str, threads: int) -> Network:
    """`network` as a function of x [N, C, H, W], t [N], y [N] or None; float32 in and out, any N.

    Raises ValueError where the package is not installed. The function belongs to one thread at a time.
    """
    try:
        import openvino as ov
    except ImportError as error:
        raise ValueError("runtime openvino needs the package: pip install 'ddpm-serve[openvino]'") from error
    config = network.config
    t, y = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
    example = (torch.zeros(2, *config.image_shape), t) + ((y,) if config.num_classes is not None else ())
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # it traces with torch.jit, which is deprecated
        converted = ov.convert_model(network.eval(), example_input=example)
    for place, tensor in zip(converted.inputs, example, strict=True):
        place.get_node().set_partial_shape(ov.PartialShape([-1, *tensor.shape[1:]]))
    converted.validate_nodes_and_infer_types()
    how = {
        "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # other processes may have the core that it would be tied to
    }
    run = ov.Core().compile_model(converted, "CPU", how).create_infer_request()

    def forward(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        given = (x, t.float()) if y is None else (x, t.float(), y)
        out = run.infer([tensor.contiguous().numpy() for tensor in given], share_inputs=True)
        return torch.from_numpy(out[0])

    return forward
