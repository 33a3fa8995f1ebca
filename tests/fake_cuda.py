"""A CUDA device on a build of torch that has none. Its tensors have a shape, a type and strides, but no numbers.

What is on "cuda" is a FakeTensor: torch works out shapes, types and strides, and refuses operands of two devices, as it
would on a GPU. What is on the CPU is real. `FakeCuda` sees every operator in between. It makes up the numbers that the
host reads, counts which reads would wait for the device, and applies the rules of a CUDA graph while one is recorded.

It finds tensors on the wrong device, copies and waits where none may be, random numbers and garbage in a recording.
It cannot find what depends on numbers, streams, the allocator, cuDNN's layouts or the backward pass.
"""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
READS = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
RANDOM = torch.Tag.nondeterministic_seeded
FREE_BYTES, ALL_BYTES = 70 * 2**30, 80 * 2**30


class NotRecordable(RuntimeError):
    """A GPU would refuse this in a CUDA graph, or repeat something else than was meant."""


class Recording:
    """The operators of one CUDA graph, and the tensors that they made: none of them may be there when it is done."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self._made: list[tuple[str, weakref.ref[Tensor]]] = []

    def check(self, func: Any, given: list[Tensor]) -> None:
        """Raises NotRecordable where `func` needs the host, or draws random numbers."""
        if func is aten._pin_memory.default or any(tag in func.tags for tag in READS):
            raise NotRecordable(f"{func} waits for the device in a recording")
        # An attention could draw numbers, for dropout. It must not, but its operator says only that it could.
        if RANDOM in func.tags and "attention" not in str(func):
            raise NotRecordable(f"{func} draws from torch's generator in a recording")
        for tensor in given:  # a number on the host becomes a kernel's argument, and is only as good as it was then
            if tensor.device.type != "cuda" and (tensor.dim() or func in COPIES):
                raise NotRecordable(f"{func} reads {tuple(tensor.shape)} on {tensor.device} in a recording")

    def add(self, func: Any, given: list[Tensor], made: list[Tensor]) -> None:
        """Raises NotRecordable where `func` made something on the host."""
        self.operators[str(func)] += 1
        for tensor in made:
            if tensor.device.type != "cuda":
                raise NotRecordable(f"{func} makes {tuple(tensor.shape)} on {tensor.device} in a recording")
            if all(tensor is not other for other in given):
                self._made.append((str(func), weakref.ref(tensor)))

    def survivors(self) -> list[str]:
        """What made those that are still there: one pool of memory for graphs in any order would overwrite them."""
        return [name for name, tensor in self._made if tensor() is not None]


class FakeCuda(TorchDispatchMode):
    """What stands between the code and its operators while `fake_cuda` holds.

    `waits` counts what waited for the device, by operator; `recordings` are the graphs that `record` made; `nonzero`
    is how many indices `torch.nonzero` finds (None: all of them).
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.recordings: list[Recording] = []
        self.nonzero: int | None = None
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._now: Recording | None = None
        self._pinned: dict[int, Any] = {}  # address → storage, kept so that no other gets its address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_on_gpu = any(tensor.device.type == "cuda" for tensor in given)
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if self._now is not None:
            self._now.check(func, given)
        if not is_on_gpu and not to_gpu:
            made = self._on_host(func, args, kwargs)
        elif (answer := self._between(func, given, args, kwargs)) is not None:
            made = answer
        else:
            made = self._on_device(func, args, kwargs)
        if self._now is not None:
            self._now.add(func, given, [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)])
        return made

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        pinned = kwargs.pop("pin_memory", None) or func is aten._pin_memory.default
        made = args[0].clone() if func is aten._pin_memory.default else func(*args, **kwargs)
        if pinned:
            storage = made.untyped_storage()
            self._pinned[storage.data_ptr()] = storage
        return made

    def _on_device(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func is aten.index_copy_.default:  # which the shapes' rules do not look at
            assert args[0].dtype == args[3].dtype, f"index_copy_ of {args[3].dtype} into {args[0].dtype}"
        kwargs.pop("pin_memory", None)
        with self._fake:
            return func(*args, **kwargs)

    def _between(self, func: Any, given: list[Tensor], args: Any, kwargs: dict[str, Any]) -> Any:
        """What the host gets of the device, and the other way round. None for what stays on the device."""
        if func is aten._pin_memory.default:
            raise RuntimeError("cannot pin 'torch.cuda.ByteTensor' only dense CPU tensors can be pinned")
        if func is aten._local_scalar_dense.default:
            self.waits["item"] += 1
            return True if args[0].dtype == torch.bool else 1.0 if args[0].is_floating_point() else 1
        if func is aten.equal.default:
            self.waits["equal"] += 1
            assert (args[0].device, args[0].dtype) == (args[1].device, args[1].dtype), "torch.equal of two kinds"
            return args[0].shape == args[1].shape
        if func is aten.nonzero.default:
            self.waits["nonzero"] += 1
            count = args[0].numel() if self.nonzero is None else self.nonzero
            with self._fake:
                return torch.zeros(count, args[0].dim(), dtype=torch.int64, device=CUDA)
        if func is aten.copy_.default:
            to, source = args[:2]
            if to.device.type != source.device.type:
                self._count_copy(to, source, (len(args) > 2 and args[2]) or kwargs.get("non_blocking", False))
                assert torch.broadcast_shapes(to.shape, source.shape) == to.shape, "copy_ of another shape"
                return to if to.device.type == "cuda" else to.fill_(1)
        if func is aten._to_copy.default:
            source, device = args[0], torch.device(kwargs["device"] or "cpu") if "device" in kwargs else args[0].device
            if device.type != source.device.type:
                self._count_copy(None, source, kwargs.get("non_blocking", False))
                if device.type == "cpu":
                    return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
                return self._on_device(func, (self._fake.from_tensor(source), *args[1:]), kwargs)
        return None

    def _count_copy(self, to: Tensor | None, source: Tensor, non_blocking: bool) -> None:
        """A copy is waited for unless it need not be, and the host's memory is pinned."""
        hosts = source if source.device.type == "cpu" else to
        is_pinned = hosts is not None and hosts.untyped_storage().data_ptr() in self._pinned
        if not (non_blocking and is_pinned):
            self.waits["copy to the device" if source.device.type == "cpu" else "copy to the host"] += 1

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """Stands in for a `model.backends.cuda.CudaRecorder`. What it returns does nothing. Raises NotRecordable."""
        run()
        gc.collect()
        gc.disable()  # what only a collection would free is not free when the next graph is recorded
        self._now = recording = Recording()
        try:
            run()
            if left := recording.survivors():
                raise NotRecordable(f"{len(left)} tensors outlive their recording, one of them made by {left[0]}")
        finally:
            self._now = None
            gc.enable()
        self.recordings.append(recording)
        return lambda: None


class Generator(torch.Generator):
    """One of the device that it names."""

    of: torch.device

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls, device="cpu")
        made.of = torch.device(device)
        return made


class Arguments(TorchFunctionMode):
    """Makes "cuda" mean cuda:0, and refuses a generator of another device than the numbers'."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:  # which has no index where none is named, unlike those of tensors
            return func(*args, **kwargs)
        args = tuple(CUDA if isinstance(a, (str, torch.device)) and str(a) == "cuda" else a for a in args)
        if str(kwargs.get("device")) == "cuda" or (func is Tensor.cuda and len(args) == 1):
            kwargs["device"] = CUDA
        if isinstance(generator := kwargs.get("generator"), Generator):
            own = args[0].device if args and isinstance(args[0], Tensor) else "cpu"
            device = torch.device(kwargs.get("device") or own)
            if generator.of.type != device.type:
                raise RuntimeError(
                    f"Expected a {device.type!r} device type for generator but found {generator.of.type!r}"
                )
            if device.type == "cuda":  # its numbers are none
                del kwargs["generator"]
        return func(*args, **kwargs)


class Event:
    """Nothing is ever under way. `spins` counts those that would keep a core busy while they wait."""

    spins = 0

    def __init__(self, blocking: bool = False) -> None:
        Event.spins += not blocking

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


def applied(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """nn.Module._apply, which would swap what parameters hold: a real one cannot become a fake one."""
    for child in module.children() if recurse else ():
        applied(child, change)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(change(parameter), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else change(buffer)
    return module


def set_device_guard() -> None:
    """Gives CUDA the guard that meta tensors have, which does nothing: views and copies ask for one.

    It is one of c10's own tables. A build with CUDA in it has a guard.
    """
    registry = "_ZN3c104impl26device_guard_impl_registryE"
    table = (ctypes.c_void_p * 20).in_dll(ctypes.CDLL(str(Path(torch.__file__).parent / "lib/libc10.so")), registry)
    cuda, meta = 1, 14  # of c10::DeviceType
    table[cuda] = table[cuda] or table[meta]


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Within it torch believes that it has one GPU."""
    stand_ins: dict[str, Any] = {
        "torch.Generator": Generator,
        "torch.nn.Module._apply": applied,
        "torch.cuda.Event": Event,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.current_device": lambda: CUDA.index,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.get_device_capability": lambda *_: (9, 0),
        "torch.cuda.get_device_name": lambda *_: "a fake GPU",
        "torch.cuda.graph_pool_handle": lambda: (0, 1),
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.is_bf16_supported": lambda *_, **__: True,
        "torch.cuda.mem_get_info": lambda *_: (FREE_BYTES, ALL_BYTES),
        "torch.cuda.synchronize": lambda *_: None,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch._C._InferenceMode": lambda mode: torch.no_grad(),  # in which composite operators are not taken apart
        "torch._subclasses.fake_tensor.FakeTensorMode.avoid_device_init": True,
    }
    set_device_guard()
    flags = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    matmul = torch.backends.cuda.matmul.allow_tf32
    lifts = torch._C._only_lift_cpu_tensors()
    with ExitStack() as stack:
        for name, value in stand_ins.items():
            stack.enter_context(mock.patch(name, value))
        device = stack.enter_context(FakeCuda())
        stack.enter_context(Arguments())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is a copy, which is seen
        Event.spins = 0
        gc.freeze()  # `record` collects garbage, and need not look at what was there before
        try:
            yield device
        finally:
            gc.unfreeze()
            torch._C._set_only_lift_cpu_tensors(lifts)
            cudnn = torch.backends.cudnn
            cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = flags
            torch.backends.cuda.matmul.allow_tf32 = matmul
