"""A stand-in for a GPU on a machine that has none: the scripts see `cuda:0`, which a CPU computes.

    with fake_gpu() as gpu:
        script.main(arguments)
    assert gpu.reads == {...}

It refuses what a GPU refuses: a host that takes a device's tensor for its own (`.numpy()`), and operations on tensors
of two devices. It counts where the host waits, by the line of the script that asked: for a value (`.item()`, `.cpu()`,
`if tensor:`, `nonzero`), and for a copy to the device without `non_blocking`. A captured graph, `torch.cuda.graph`, may
do neither, and is replayed in the memory that it was captured in.

Values are as exact as a CPU's, but not bit-equal to it: attention is computed in parts. There is no autocast, so train
in float32. Python sees devices named `cuda`; torch's C++ sees one of its own, because builds without CUDA refuse that.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.state import PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

ROOT = Path(__file__).resolve().parents[1]
SEEN = torch.device("cuda", 0)  # what Python sees
MEMORY = 80 * 10**9  # bytes
aten = torch.ops.aten
# The host waits for these, because it returns a number or has to know the shape of what comes out.
WAITING = {
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.repeat_interleave.Tensor,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default}
OF_TWO_DEVICES = COPIES | INDEXING  # a GPU takes indices from the host as well


class Gpu:
    """What was seen of the stand-in."""

    def __init__(self) -> None:
        # Lines of the scripts at which the host waited, as `function: line`.
        self.reads: Counter[str] = Counter()  # for values
        self.copies: Counter[str] = Counter()  # for copies to the device
        self.graph: Graph | None = None  # that is being captured

    def wait(self, operation: object, counter: Counter) -> None:
        """Count an operation that the host waits for."""
        if self.graph is not None:
            raise RuntimeError(f"{operation}: operation not permitted when stream is capturing")
        for frame in reversed(traceback.extract_stack()):
            if Path(frame.filename).parent == ROOT:
                counter[f"{frame.name}: {frame.line}"] += 1
                return
        counter[str(operation)] += 1


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`: what was captured is computed again, into the tensors that it gave."""

    def __init__(self) -> None:
        self.steps: list[tuple] = []

    def replay(self) -> None:
        for operation, args, kwargs, results in self.steps:
            again = operation(*args, **kwargs)
            for result, value in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(value, torch.Tensor) and result.data_ptr() != value.data_ptr():
                    result.copy_(value)


GPU = Gpu()


class DeviceTensor(torch.Tensor):
    """A tensor on the stand-in. `held` has its values, on the CPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device("standin", 0), **layout)

    def __init__(self, held: torch.Tensor):
        self.held = held

    device = property(lambda self: SEEN)
    is_cuda = property(lambda self: True)

    def __tensor_flatten__(self):  # lets `module.to(device)` keep tied weights tied
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return DeviceTensor(inner["held"])

    def __reduce_ex__(self, protocol):  # `torch.save` reads it
        return self.held.__reduce_ex__(protocol)

    def __repr__(self):
        return f"DeviceTensor({self.held!r})"

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        GPU.wait("tolist", GPU.reads)
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def held(value):
    return value.held if isinstance(value, DeviceTensor) else value


def is_ours(device) -> bool:
    return isinstance(device, torch.device) and device.type == "standin"


def compute(operation, args: tuple, kwargs: dict):
    """Let the CPU compute an operation on tensors of the stand-in, or one that makes such tensors."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    theirs = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    stays = bool(ours)  # whether the result is the stand-in's
    if kwargs.get("device") is not None:
        stays = is_ours(kwargs["device"])
        kwargs = {**kwargs, "device": torch.device("cpu")}
    elif operation is aten.copy_.default:
        stays = isinstance(args[0], DeviceTensor)
    if ours and operation not in OF_TWO_DEVICES and any(tensor.dim() for tensor in theirs):
        raise RuntimeError(f"{operation}: expected all tensors to be on the same device, not on cuda:0 and cpu")
    blocks = not (kwargs.get("non_blocking") or (operation is aten.copy_.default and args[2:] == (True,)))
    by_mask = operation in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
    if operation in WAITING or by_mask or (ours and not stays and blocks):
        GPU.wait(operation, GPU.reads)
    elif operation in COPIES and stays and blocks and any(tensor.dim() for tensor in theirs):
        GPU.wait(operation, GPU.copies)
    kwargs.pop("pin_memory", None)
    args_held, kwargs_held = tree_map(held, (args, kwargs))
    result = operation(*args_held, **kwargs_held)
    if GPU.graph is not None:
        GPU.graph.steps.append((operation, args_held, kwargs_held, result))
    returned = operation._schema.returns
    if returned and returned[0].alias_info is not None and returned[0].alias_info.is_write:  # in place
        return kwargs.get("out", args[0])
    return tree_map_only(torch.Tensor, DeviceTensor, result) if stays else result


class MakeTensors(TorchDispatchMode):
    """Makes tensors on the stand-in where torch is asked for them by device."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # in which operations come whole that are made of others, such as `to`
            with self:
                result = operation.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if is_ours(kwargs.get("device")) or any(isinstance(value, DeviceTensor) for value in tree_leaves(args)):
            return compute(operation, args, kwargs)
        return operation(*args, **kwargs)


class NameDevices(TorchFunctionMode):
    """Tells torch's C++ the stand-in where Python says `cuda`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.cuda:
            return args[0].to(torch.device("standin", 0))
        if function is torch.Tensor.pin_memory:
            return args[0]
        args, kwargs = tree_map(inner_name, (args, kwargs or {}))
        return function(*args, **kwargs)


def inner_name(value):
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("standin", 0)
    return torch.device("standin", 0) if isinstance(value, str) and value in ("cuda", "cuda:0") else value


class Presence:
    """Whether there is a stand-in now: torch registers one for the whole process."""

    is_there = False

    def is_available(self) -> bool:
        return Presence.is_there


class Hook(Presence, _DummyPrivateUse1Hook):
    """What torch's C++ asks."""


class Backend(Presence, _DummyBackendModule):
    """What `torch.accelerator` asks."""


# When it is imported, because autograd counts the devices at its first backward pass.
_setup_privateuseone_for_python_backend("standin", backend_module=Backend(), hook=Hook())


@contextlib.contextmanager
def capture(graph: Graph, *_, **__) -> Iterator[None]:
    """Stands in for `torch.cuda.graph`."""
    GPU.graph = graph
    try:
        yield
    finally:
        GPU.graph = None


class Nothing:
    """Stands in for streams and events, which have nothing to wait for."""

    def __init__(self, *_, **__) -> None:
        self.device = SEEN

    def __getattr__(self, name):
        return lambda *_, **__: None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        pass


CUDA = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda including_emulation=True: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: "stand-in",
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=MEMORY, name="stand-in"),
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "memory_allocated": lambda device=None: 0,
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: None,
    "manual_seed_all": lambda seed: None,
    "CUDAGraph": Graph,
    "graph": capture,
    "graph_pool_handle": lambda: None,
    "Stream": Nothing,
    "Event": Nothing,
    "current_stream": lambda device=None: Nothing(),
    "stream": lambda stream: contextlib.nullcontext(),
}
ACCELERATOR = {
    "is_available": lambda: True,
    "current_accelerator": lambda check_available=False: torch.device("cuda"),
    "synchronize": lambda device=None: None,
}


@contextlib.contextmanager
def fake_gpu() -> Iterator[Gpu]:
    """A world in which this process has one GPU."""
    GPU.__init__()
    lifts_before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(…, device=…)` is made on the CPU first
    Presence.is_there = True
    try:
        with (
            mock.patch.multiple(torch.cuda, **CUDA),
            mock.patch.multiple(torch.accelerator, **ACCELERATOR),
            mock.patch.object(PartialState, "default_device", torch.device("cuda", 0)),
            mock.patch("torch.utils.data._utils.pin_memory.pin_memory", lambda data, device=None: data),
            MakeTensors(),
            NameDevices(),
        ):
            yield GPU
    finally:
        Presence.is_there = False
        torch._C._set_only_lift_cpu_tensors(lifts_before)
