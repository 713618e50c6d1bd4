"""What a user sees of a failure: rank x command x kind. The rank that failed says why, and nobody else is accused.

Every command starts on two ranks without a launcher, which would end them all when one fails.
"""

import re
import signal
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from run_folders import save_run
from world_cases import configured, run_of

from eae_dist.distributed import hanging
from eae_dist.distributed.failures import of_collective
from eae_dist.encode import encode
from eae_dist.errors import MissingFile, UserError, UserFileError, is_users
from eae_dist.model.own_networks import imported

NETWORKS = ("model.encoder=saboteur:TroubledEncoder", "model.decoder=saboteur:TroubledDecoder")
COMMANDS = ("train", "evaluate", "encode", "neighbors", "generate")
RAISED = {  # kind of trouble: what the user must read of it
    "ValueError": "ValueError: dictionary update sequence element #0 has length 3; 2 is required",
    "RuntimeError": "RuntimeError: mat1 and mat2 shapes cannot be multiplied",
    "OSError": "OSError: the server of this network does not answer",
    "out of memory": "torch.OutOfMemoryError: CUDA out of memory",
}
TIMEOUT = 4  # seconds


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory) -> Path:
    return save_run(tmp_path_factory.mktemp("troubled") / "run", configured(shards, "eae", *NETWORKS))


@pytest.fixture(scope="module")
def latents(run, tmp_path_factory) -> Path:
    return encode(run, tmp_path_factory.mktemp("latents") / "latents", list(NETWORKS)).root


def words(command: str, shards: Path, run: Path, latents: Path, out: Path) -> list[str]:
    """The arguments of a command, in whose networks there is trouble."""
    start = (*NETWORKS, f"train.timeout={TIMEOUT}", "train.device=cpu")
    block = "evaluate.batch=8"
    return {
        "train": run_of(shards, out, *start, "train.validate_every=1000000"),
        "evaluate": ["--ckpt", str(run), "--out", str(out), *start, block, f"evaluate.cache={out}/cache"],
        "encode": ["--ckpt", str(run), "--out", str(out), *start],
        "neighbors": ["--latents", str(latents), "--out", str(out), *start, "index.samples=40"],
        "generate": ["--ckpt", str(run), "--count", "40", str(out), *start, block],
    }[command]


def started(command: str, *arguments: str) -> None:
    hanging.GRACE = 2.0  # a rank that hangs here is not slow
    import_module(f"eae_dist.{command}").main(list(arguments))


def ended(command: str, kind: str, rank: int, shards: Path, run: Path, latents: Path, folder: Path):
    """How both ranks ended, the failing one first: codes and what they said."""
    arguments = words(command, shards, run, latents, folder / "out")
    environment = {"SABOTEUR_KIND": kind, "SABOTEUR_RANK": rank, "SABOTEUR_STEP": 2}
    both = run_ranks(2, folder / "logs", started, command, *arguments, environment=environment, timeout=TIMEOUT + 60)
    return (both.codes[rank], both.codes[1 - rank]), (both.said[rank], both.said[1 - rank])


def accused(said: str) -> set[int]:
    """The ranks of which the text says that they failed, ended or hang."""
    named = re.findall(
        r"rank (\d+(?:, \d+)*)(?:, or the machine or network that it is on,)? (?:failed \(|failed: |ended or hangs)", said
    )
    return {int(number) for numbers in named for number in numbers.split(", ")}


TABLE = [(command, kind, rank) for command in ("train", "evaluate") for kind in RAISED for rank in (0, 1)]
TABLE += [(command, kind, 1) for command in ("encode", "neighbors", "generate") for kind in ("ValueError", "RuntimeError")]


@pytest.mark.parametrize("command, kind, rank", TABLE)
def test_traceback_of_the_rank_that_failed_is_seen_and_nobody_else_is_accused(
    command, kind, rank, shards, run, latents, tmp_path
):
    codes, (failing, other) = ended(command, kind, rank, shards, run, latents, tmp_path)
    assert all(code > 0 for code in codes)
    for text in [failing, *([(tmp_path / "out" / "crashes" / f"rank-{rank}.txt").read_text()] if command == "train" else [])]:
        assert "Traceback" in text and "saboteur.py" in text and re.search(RAISED[kind], text), text
        assert not accused(text) and "ended or hangs" not in text, text
    assert accused(other) <= {rank} and "saboteur.py" not in other, other
    if rank == 1:  # rank 0 serves the store, in which others read why a rank failed
        assert re.search(rf"rank 1 failed(?: \(|: ){RAISED[kind].removeprefix('torch.')}", other), other


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["killed", "hanging"])
def test_rank_that_is_killed_or_hangs_is_named_by_the_other(command, kind, shards, run, latents, tmp_path):
    (failing, code), (_, other) = ended(command, kind, 1, shards, run, latents, tmp_path)
    assert code > 0 and "rank 1 ended or hangs: no answer" in other and accused(other) == {1}, other
    assert "Traceback" not in other, other
    assert failing == -signal.SIGKILL  # one that hangs is killed by the other


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_rank_zero_that_is_killed_is_named_though_the_store_ends_with_it(command, shards, run, latents, tmp_path):
    (_, code), (_, other) = ended(command, "killed", 0, shards, run, latents, tmp_path)
    assert code > 0 and accused(other) == {0}, other


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_file_that_is_not_there_is_one_line(command, shards, run, latents, tmp_path):
    codes, (failing, other) = ended(command, "no file", 1, shards, run, latents, tmp_path)
    lines = [line for line in failing.splitlines() if line.startswith("error")]
    assert all(code > 0 for code in codes)
    assert lines == ["error [rank 1]: [Errno 2] No such file or directory: '/nowhere/weights.pt'"] and "Traceback" not in failing
    assert accused(other) <= {1}, other


@pytest.mark.parametrize(
    "error, users",
    [
        (UserError("data.root is wrong"), True),
        (UserFileError("the disk is full"), True),
        (MissingFile("no index.json"), True),
        (PermissionError(13, "Permission denied", "runs"), True),
        (OSError(28, "No space left on device"), True),
        (ValueError("zip() argument 2 is shorter than argument 1"), False),
        (OSError("the server does not answer"), False),
        (KeyError("name"), False),
    ],
)
def test_errors_of_a_user_are_those_that_name_what_to_set_right(error, users):
    assert is_users(error) is users


@pytest.mark.parametrize(
    "error, talking",
    [
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [::1]:3"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (ConnectionResetError("Connection reset by peer"), False),
    ],
)
def test_only_an_error_of_a_collective_accuses_other_ranks(error, talking):
    assert of_collective(error) is talking


def test_error_inside_a_users_module_is_not_called_a_wrong_name(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_network.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "wrong_network.py").write_text("one, two = (1, 2, 3)\n")
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name"):
        imported("broken_network:Class", "model.encoder", "package.module:Class")
    with pytest.raises(ValueError, match="too many values") as wrong:
        imported("wrong_network:Class", "model.encoder", "package.module:Class")
    assert not is_users(wrong.value)
    for name in ("broken_netwrok:Class", "json:NoSuchClass", ":Class", "json"):
        with pytest.raises(UserError, match=f"model.encoder={name} cannot be imported as package.module:Class"):
            imported(name, "model.encoder", "package.module:Class")
