"""A GPU that tests pretend to have: tensors whose device is `gpu:0`, and which a CPU computes.

An operation raises RuntimeError if it mixes tensors of the GPU and of the CPU; a CPU tensor without dimensions may take part, as
on a real GPU. `WAITS` lists the operations for which a host waits until a real GPU has done its work: values that Python reads,
shapes that depend on values, and copies between the devices that are not `non_blocking`. An entry names the operation and the
line of this package.

`pretend()` makes the device that of accelerate, so a whole command runs on it. It cannot be undone, so call it in a process
of its own (`ranks.run_ranks`). A collective raises RuntimeError for a tensor that does not lie on the device of its group: the
GPU, or the CPU for a group that was made with the backend gloo.

What it cannot show: what a GPU rounds otherwise, code behind `is_cuda` (such as torch's own batch norm on one GPU), streams, and
so values that are read before they are there, pinned memory, memory that runs out, compiled networks, and NCCL. Between ranks
the tensors travel over gloo.
"""

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from eae_dist.distributed import collectives, start
from eae_dist.training import setup

DEVICE = torch.device("cpu")  # `pretend` makes it gpu:0
WAITS: list[str] = []
READS = {"_local_scalar_dense", "is_nonzero", "equal", "_linalg_check_errors"}  # values that the host reads
SHAPES = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}  # shapes that values decide
AUTOCAST = ("conv2d", "conv_transpose2d.input", "linear", "matmul", "mm", "bmm", "addmm")  # products, which autocast rounds
# The API is private and may change or be absent in other releases of torch.
MISSING = None if hasattr(backend_registration, "_setup_privateuseone_for_python_backend") else f"torch {torch.__version__}"
KEY = "PrivateUse1"
_cpu_groups: list = []
_libraries: list[torch.library.Library] = []  # a registration ends with its library


class Gpu(torch.Tensor):
    """A tensor on the pretended GPU; `values` is the CPU tensor with its numbers, in the same memory format."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        tensor = torch.Tensor._make_wrapper_subclass(cls, values.shape, device=DEVICE, **layout)
        tensor.values = values
        return tensor

    def __repr__(self, **_) -> str:
        return f"Gpu({self.values})"

    def tolist(self):  # torch has none for a subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _computed(operation, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Sees the operations that have no tensor of the GPU among their arguments, and may make one."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return _computed(operation, args, kwargs or {})


class Watching(TorchDispatchMode):
    """Changes nothing. For runs on the CPU: where a mode watches, autograd adds gradients in new memory and not in place."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return operation(*args, **(kwargs or {}))


class _Module(backend_registration._DummyBackendModule if MISSING is None else object):
    """What torch asks of the module of a device, such as torch.cuda."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def pretend() -> None:
    """Gives torch the pretended GPU, accelerate its device, and `message_device` the device that NCCL would need."""
    global DEVICE
    backend_registration._setup_privateuseone_for_python_backend("gpu", _Module())
    DEVICE = torch.device("gpu:0")
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
    start.refuse_other_engines = lambda env: None  # it refuses that variable
    check = start.require_taken  # it refuses a device that no setting names
    for module in (start, setup):
        module.require_taken = lambda asked, taken: check(asked | {"device": taken["device"]}, taken)
    collectives.DEVICES["gloo"] = str(DEVICE)
    kernels = torch.library.Library("aten", "IMPL")
    kernels.impl("empty_strided", lambda size, stride, dtype=None, **_: Gpu(torch.empty_strided(size, stride, dtype=dtype)), KEY)
    kernels.impl("empty.memory_format", lambda size, dtype=None, **_: Gpu(torch.empty(size, dtype=dtype)), KEY)
    kernels.impl("_copy_from", _copied, KEY)  # by torch.tensor(..., device=...), which no mode sees
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, f"Autocast{KEY}")
    for name in AUTOCAST:
        kernels.impl(name, _rounded(name), f"Autocast{KEY}")
    _libraries.extend((kernels, others))
    torch.nn.Module.to = _moved
    DistributedDataParallel.__init__ = _averaging_here(DistributedDataParallel.__init__)
    dist.new_group = _noted(dist.new_group)
    for name in ("all_reduce", "broadcast", "all_to_all_single", "all_gather_into_tensor", "all_gather_single"):
        if hasattr(dist, name):
            setattr(dist, name, _checked(getattr(dist, name)))
    _Factories().__enter__()


def _moved(module: torch.nn.Module, *args, to=torch.nn.Module.to, **kwargs) -> torch.nn.Module:
    """Is `nn.Module.to`, which on a real GPU keeps the identity of the parameters; an optimizer may already hold them."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(any(x in (DEVICE, str(DEVICE)) for x in (*args, *kwargs.values())))
    try:
        return to(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@contextmanager
def waits() -> Iterator[list[str]]:
    """Yields a list that has the waits of its context afterwards."""
    found, before = [], len(WAITS)
    yield found
    found += WAITS[before:]


def _averaging_here(start: Callable) -> Callable:
    """Returns the constructor of DDP, which would put the CPU tensors that gloo returns in the place of the gradients."""

    def averaged(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        dist.all_reduce(buffer := bucket.buffer().div_(dist.get_world_size()))
        future = torch.futures.Future()
        future.set_result(buffer)
        return future

    def started(self, *args, **kwargs):
        start(self, *args, **kwargs)
        chosen = [None, averaged]  # DDP takes one hook only, and the run may have its own
        self.register_comm_hook(chosen, lambda chosen, bucket: chosen[1](chosen[0], bucket))
        self.register_comm_hook = lambda *own: chosen.__setitem__(slice(None), own)

    return started


def _noted(new_group: Callable) -> Callable:
    """Returns `dist.new_group`, which notes groups for tensors of the CPU."""

    def made(*args, backend: str | None = None, **kwargs):
        group = new_group(*args, backend=backend, **kwargs)
        if backend == "gloo":
            _cpu_groups.append(group)
        return group

    return made


def _checked(collective: Callable) -> Callable:
    """Returns a collective that refuses tensors which lie elsewhere than those of its group."""

    def run(*tensors, group=None, **kwargs):
        device = "cpu" if any(group is other for other in _cpu_groups) else DEVICE.type
        if wrong := [tuple(x.shape) for x in tensors if isinstance(x, torch.Tensor) and x.device.type != device]:
            raise RuntimeError(f"{collective.__name__} sends tensors of shape {wrong} that are not on the {device}; {_place()}")
        return collective(*tensors, group=group, **kwargs)

    return run


def values_of(tree):
    """Returns the tensors of nested dicts and lists on the CPU, without a wait."""
    return pytree.tree_map(lambda x: x.detach().values if isinstance(x, Gpu) else x, tree)


def _computed(operation, args: tuple, kwargs: dict):
    """Returns the result of an operation, on the device that a GPU would give it."""
    leaves = pytree.tree_leaves((args, kwargs))
    ours = [x for x in leaves if isinstance(x, Gpu)]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if not ours and (device is None or device.type != DEVICE.type):
        return operation(*args, **kwargs)
    name = operation.overloadpacket.__name__
    theirs = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, Gpu)]
    if ours and name not in ("_to_copy", "copy_") and any(x.ndim for x in theirs):
        shapes = ", ".join(str(tuple(x.shape)) for x in theirs)
        raise RuntimeError(f"{operation} mixes tensors of the GPU and of the CPU, the latter of shape {shapes}; {_place()}")
    if _waits(name, args, kwargs, ours, device):
        WAITS.append(f"{name} {_place()}")

    on_gpu = bool(ours) if device is None else device.type == DEVICE.type
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    known = {id(x.values): x for x in ours}  # what is computed in place comes back as the same tensor
    args, kwargs = pytree.tree_map(lambda x: x.values if isinstance(x, Gpu) else x, (args, kwargs))
    result = operation(*args, **kwargs)
    if not on_gpu or (name == "copy_" and id(result) not in known):
        return result
    return pytree.tree_map(lambda x: known.get(id(x), Gpu(x)) if isinstance(x, torch.Tensor) else x, result)


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copies between the devices, or on one of them."""
    if _waits("copy_", (target, source, non_blocking), {}, [], None):
        WAITS.append(f"copy_ {_place()}")
    source, to = (x.values if isinstance(x, Gpu) else x for x in (source, target))
    to.copy_(source)
    return target


def _waits(name: str, args: tuple, kwargs: dict, ours: list[Gpu], device: torch.device | None) -> bool:
    """Returns whether the host waits for a real GPU in this operation."""
    if name in ("copy_", "_to_copy"):
        non_blocking = args[2] if name == "copy_" and len(args) > 2 else kwargs.get("non_blocking", False)
        source = isinstance(args[1 if name == "copy_" else 0], Gpu)
        target = isinstance(args[0], Gpu) if name == "copy_" or device is None else device.type == DEVICE.type
        return source != target and not non_blocking
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        mask = any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        return mask and (name == "index" or args[2].numel() > 1)  # one number is filled in without counting the places
    return bool(ours) and name in READS | SHAPES


def _place() -> str:
    """Returns the innermost line of this package that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if "/eae_dist/" in frame.filename:
            return f"in {frame.filename.rpartition('/eae_dist/')[2]}: {frame.line}"
    return "outside of this package"


def _rounded(name: str) -> Callable:
    """Returns an operation that autocast gives rounded arguments."""
    operation, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, operation), overload or "default")

    def run(*args, **kwargs):
        dtype = torch.get_autocast_dtype(DEVICE.type)

        def rounded(x):
            return x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return operation(*pytree.tree_map(rounded, args), **kwargs)

    return run
