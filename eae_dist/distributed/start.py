"""How the process of any command starts: its rank, its device, its arithmetic, and the timeout of all messages between ranks.

Every command starts here, so none of this can differ between commands. The variables of the launcher are read here alone.
"""

import ctypes
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState

from eae_dist.distributed.collectives import is_initialized, set_group_timeouts, world_size
from eae_dist.distributed.failures import first_line, tell_process
from eae_dist.errors import UserError
from eae_dist.numerics.keyed_random import derive_key
from eae_dist.numerics.precision import allow_tf32

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # accelerate reads them, and would wait for such ranks
OTHER_ENGINES = ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG", "SAGEMAKER")  # in ACCELERATE_USE_...
TOLD_AFTER = 5.0  # seconds of waiting for other ranks, after which the user hears of it
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Start:
    """How a command starts. device: auto or cpu. timeout: in seconds, of every message between ranks."""

    device: str
    timeout: float
    tf32: bool
    deterministic: bool


def start(how: Start) -> torch.device:
    """Starts this process: joins the ranks of its launcher, if there is one; returns its device.

    Call on every rank. A second call changes the arithmetic and the timeout. Raises UserError for variables of a launcher that do
    not fit together, for ranks that do not come within the timeout, and for more ranks than GPUs.
    """
    os.environ |= srun_ranks(os.environ)
    refuse_other_engines(os.environ)
    check_restarts(os.environ)
    place = Place.of(os.environ)
    cpu = how.device == "cpu" or not torch.cuda.is_available()
    allow_tf32(how.tf32)
    if how.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for deterministic results
    torch.use_deterministic_algorithms(how.deterministic)
    if cpu:
        keep_freed_memory()
    if place is None:
        return torch.device("cpu" if cpu else "cuda")
    if cpu:
        os.environ.setdefault("LOCAL_RANK", str(place.rank))  # accelerate asks for it; on a CPU nothing depends on it
        device = torch.device("cpu")
    else:
        device = place.gpu()
    if is_initialized():
        set_group_timeouts(how.timeout)
        return device
    store = met(place, how.timeout, None if cpu else gpu_name(device))
    # accelerate would leave a timeout out that equals its own default, and torch would take 30 minutes instead.
    timeout = timedelta(seconds=how.timeout)
    try:
        backend = "gloo" if cpu else "nccl"
        dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
    except RuntimeError as error:
        raise UserError(
            f"rank {place.rank} cannot connect to the other ranks ({first_line(error)}); where a node has several networks, name "
            f"one that all nodes share: GLOO_SOCKET_IFNAME, and for GPUs NCCL_SOCKET_IFNAME"
        ) from error
    tell_process()
    return device


def start_without_engine(how: Start) -> torch.device:
    """Starts a command that does not train, on its ranks, and fixes `PartialState().device`. See `start`."""
    device = start(how)
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)  # nothing is trained, so the launch's engine has nothing to do
    state = PartialState(cpu=device.type == "cpu")
    require_taken({"device": device.type, "ranks": world_size()}, {"device": state.device.type, "ranks": state.num_processes})
    return device


def require_taken(asked: Mapping, taken: Mapping) -> None:
    """Raises UserError for what accelerate took otherwise than it was asked; its own settings can be the reason."""
    if differing := {name: value for name, value in asked.items() if taken[name] != value}:
        named = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("ACCELERATE_")]
        told = ", ".join(f"{name} {taken[name]} instead of {value}" for name, value in differing.items())
        raise UserError(
            f"accelerate took {told}; the run's configuration decides this, so remove it from accelerate's settings "
            f"(in the environment: {', '.join(named) or 'none'})"
        )


@dataclass(frozen=True)
class Place:
    """This process among the ranks of its launcher. local: the number of its GPU on its machine. address: of rank 0."""

    rank: int
    world: int
    local: int
    address: str
    port: int

    @staticmethod
    def of(env: Mapping[str, str]) -> "Place | None":
        """Returns the place that the variables name; None without a launcher. Raises UserError for an incomplete set."""
        given = {name: env[name] for name in RANK_VARIABLES if name in env}
        if not given.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            if sizes := [f"{name}={env[name]}" for name in MPI_SIZES if env.get(name, "1") != "1"]:
                raise UserError(
                    f"{', '.join(sizes)} in the environment: an MPI launcher may have started several ranks, which would not "
                    f"know of each other; start them with torchrun, accelerate launch or srun, or unset such variables"
                )
            return None
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        missing = [name for name in RANK_VARIABLES if name not in env]
        if missing == ["LOCAL_RANK"] and not torch.cuda.is_available():
            missing = []
        if missing:
            raise UserError(
                f"the environment has {told}, but no {', '.join(missing)}: a launcher sets all of them; start with torchrun, "
                f"accelerate launch or srun, or unset what an earlier launcher left: env -u {' -u '.join(given)}"
            )
        try:
            rank, world, port = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            local = int(env.get("LOCAL_RANK", rank))
        except ValueError:
            raise UserError(f"the environment has {told}, but a launcher sets whole numbers and an address") from None
        if not 0 <= rank < world or local < 0 or not 0 <= port < 2**16:
            raise UserError(f"the environment has {told}; RANK must lie in [0, WORLD_SIZE), MASTER_PORT in [0, 65535]")
        return Place(rank, world, local, env["MASTER_ADDR"], port)

    def __str__(self) -> str:
        rank_zero = f"MASTER_ADDR={self.address}, MASTER_PORT={self.port}"
        return f"WORLD_SIZE={self.world}, RANK={self.rank}, {rank_zero} in the environment"

    def gpu(self) -> torch.device:
        """Chooses the GPU of this rank. Raises UserError if there are fewer."""
        if self.local >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"rank {self.rank} has no GPU: it is LOCAL_RANK={self.local} on {platform.node()}, which has {gpus}; start at "
                f"most {gpus} ranks on it, or set train.device=cpu"
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)


def met(place: Place, timeout: float, gpu: str | None) -> dist.Store:
    """Returns the store through which all ranks meet, once all have come. gpu: a name of this rank's GPU that no other has.

    Raises UserError if they do not come within the timeout, if the store has no port, and if two ranks have one GPU.
    """
    # The store of torchrun, if it shares one, is served by torchrun itself.
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    limit, end, told = timedelta(seconds=timeout), time.monotonic() + timeout, time.monotonic() + TOLD_AFTER
    while not serves and (unreached := unreachable(place)):  # torch would print its C++ stack at each try
        if time.monotonic() > end:
            raise UserError(f"rank {place.rank} found no rank 0 within {timeout:g} seconds ({place}): {unreached}")
        if time.monotonic() > told:
            say_waiting(f"waiting for rank 0 of {place.world} ranks ({place})")
            told = float("inf")
        time.sleep(0.1)
    try:
        store = dist.TCPStore(place.address, place.port, place.world, serves, limit, wait_for_workers=False, multi_tenant=True)
    except RuntimeError as error:
        if serves:
            raise UserError(
                f"rank 0 cannot listen at MASTER_PORT={place.port} ({first_line(error)}); another job may use this port: set "
                f"another MASTER_PORT for all ranks, or end that job"
            ) from error
        raise UserError(f"rank {place.rank} cannot talk to rank 0 ({place}): {first_line(error)}") from error
    # Every start of torchrun numbers its tries.
    prefix = f"eae_dist/start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if gpu is not None and store.add(f"{prefix}/gpu/{gpu}", 1) > 1:
        store.add(f"{prefix}/shared", 1)
    store.add(f"{prefix}/came", 1)
    told = time.monotonic() + TOLD_AFTER
    while (came := store.add(f"{prefix}/came", 0)) < place.world:
        if time.monotonic() > end:
            raise UserError(f"only {came} of {place.world} ranks came within {timeout:g} seconds ({place}); start the others too")
        if time.monotonic() > told:
            say_waiting(f"waiting for {place.world - came} of {place.world} ranks ({place})")
            told = float("inf")
        time.sleep(max(0.02, place.world / 10_000))
    if shared := store.add(f"{prefix}/shared", 0):
        raise UserError(
            f"{shared} of {place.world} ranks share a GPU with others; start as many ranks on a machine as it has GPUs"
        )
    return store


def unreachable(place: Place) -> str | None:
    """Returns why the store of rank 0 cannot be reached, None if it can."""
    try:
        socket.create_connection((place.address, place.port), timeout=5).close()
    except OSError as error:
        return str(error)
    return None


def say_waiting(message: str) -> None:
    """Prints the message to stderr; the log may not be set up yet."""
    print(message, file=sys.stderr, flush=True)


def gpu_name(device: torch.device) -> str:
    """Returns a name that no other GPU of the job has."""
    return f"{platform.node()}/{torch.cuda.get_device_properties(device).uuid}"


def refuse_other_engines(env: Mapping[str, str]) -> None:
    """Raises UserError if accelerate's settings ask for an engine or a device that this project does not use."""
    named = [f"ACCELERATE_USE_{name}" for name in OTHER_ENGINES]
    asked = [f"{name}={env[name]}" for name in named if env.get(name, "false").lower() in ("true", "1")]
    asked += [f"{name}={env[name]}" for name in ("ACCELERATE_TORCH_DEVICE",) if name in env]
    if asked:
        raise UserError(
            f"{', '.join(asked)} in the environment: training runs under PyTorch's DDP or DeepSpeed's ZeRO, on the device of "
            f"train.device; remove it from accelerate's settings (accelerate launch --config_file launch/*.yaml takes others)"
        )


def check_restarts(env: Mapping[str, str]) -> None:
    """Raises UserError if torchrun would restart ranks with a store that still has the addresses of the previous ranks.

    A rank that reads an old address before its peer has written the new one would wait for a process that has ended.
    """
    if int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise UserError(
            "torchrun --max-restarts keeps its store after a restart, so ranks can find old addresses of each other "
            "there; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun, or leave --max-restarts out"
        )


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for later allocations; for training and evaluation on CPUs.

    By default glibc returns large blocks to the kernel and gets them again, filled with zeros, for every tensor of every step.
    This takes a tenth of the time of a step at any size of network.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def srun_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that torchrun would set for this task of an srun step.

    The tasks are ranks of one job. Empty for a step of one task, and for an interactive shell started by srun.
    """
    if "RANK" in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) == 1 or sys.stdin.isatty():
        return {}
    gpus, local = torch.cuda.device_count(), int(env["SLURM_LOCALID"])  # one GPU if the step gives each task its own GPU
    port = derive_key(int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])) % 15_000
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": str(local % gpus if gpus else local),
        "LOCAL_WORLD_SIZE": str(tasks_of_nodes(env["SLURM_STEP_TASKS_PER_NODE"])[int(env["SLURM_NODEID"])]),
        "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT") or str(15_000 + port),
    }


def first_host(nodes: str) -> str:
    """Returns the first name in a node list in the short form of SLURM: gpu[07-10,12],cpu1 -> gpu07."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None  # a step has at least one node
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])


def tasks_of_nodes(counts: str) -> list[int]:
    """Returns the numbers in a list in the short form of SLURM: 4(x2),3 -> [4, 4, 3]."""
    return [int(tasks) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
