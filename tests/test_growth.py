"""What a rank sends and receives on 2 to 1,024 ranks, counted on one rank of a world whose collectives are recorded.

The formulas are those of docs/scaling.md. W: ranks, b: rows of a rank, n = W b, d: latent dimensions.
"""

import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from conftest import ROOT, image_of, write_shards
from ranks import run_ranks
from saboteur import Touch
from thumbnails import thumbnails
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from world_cases import configured

from eae_dist.config import flatten
from eae_dist.data import shard_index
from eae_dist.data.shard_index import SHARD_DTYPE, member_table
from eae_dist.data.stream import ShardStream, walk
from eae_dist.distributed import (
    StopRequest,
    average_over_ranks,
    collectives,
    ending_ranks,
    from_rank_zero,
    on_every_rank,
    rank,
    ranks_of_group,
    require_equal,
    tensors_from_rank_zero,
)
from eae_dist.latent import index as index_module
from eae_dist.latent.index import LatentIndex
from eae_dist.metrics.image_sets import describe
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.neighbors import from_their_ranks
from eae_dist.numerics.atomic_files import sha256_of
from eae_dist.objectives import build_objective
from eae_dist.training import checkpoint
from eae_dist.training.metrics_log import FINITE_NORMS, averaged

fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg", reason="this torch has no recording process group")
WORLDS = (2, 8, 64, 1024)
B, SHAPE = 4, (1, 16, 16)
SCALING = ROOT / "docs" / "scaling.md"


class Traffic(TorchDispatchMode):
    """The collectives in its context. `calls`: how often each was called. `moved`: the bytes that this rank received by each.

    `sent`, `received`: bytes of all. `largest`: the bytes of the largest tensor on either side.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.moved = Counter(), Counter()
        self.sent = self.received = self.largest = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation.namespace == "c10d":
            name, others = operation.overloadpacket.__name__, (dist.get_world_size() - 1) / dist.get_world_size()
            sizes = [sum(x.nbytes for x in pytree.tree_leaves(argument)) for argument in args[:2] if holds_tensors(argument)]
            if name == "allreduce_":  # around the ring, each rank passes on all parts but its own, twice
                sent = received = 2 * sizes[0] * others
            elif name == "broadcast_":
                sent = received = sizes[0]
            else:  # in a gather each rank passes on what it received
                out, given = sizes
                sent, received = (out if "gather" in name else given) * others, out * others
            self.calls[name] += 1
            self.moved[name] += received
            self.sent, self.received = self.sent + sent, self.received + received
            self.largest = max([self.largest, *sizes])
        return operation(*args, **(kwargs or {}))


def holds_tensors(argument) -> bool:
    return isinstance(argument, torch.Tensor | list) and all(isinstance(x, torch.Tensor) for x in pytree.tree_leaves(argument))


@contextmanager
def world_of(ranks: int, monkeypatch) -> Iterator[Traffic]:
    """Makes this process rank 0 of so many; what the others send has the right shape and any values."""
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=ranks)
    monkeypatch.setattr(collectives, "_is_small", lambda *_: False)  # as on GPUs
    try:
        with Traffic() as traffic:
            yield traffic
    finally:
        dist.destroy_process_group()


def counted(text: str, **sizes: int) -> float:
    """What a formula of docs/scaling.md gives; `text` is how its line begins."""
    lines = [line for line in SCALING.read_text().splitlines() if line.startswith(f"| {text} |")]
    assert len(lines) == 1, f"docs/scaling.md has {len(lines)} lines about {text}"
    return eval(lines[0].split("|")[-2].strip(" `").replace("^", "**"), {"ceil": math.ceil, "max": max}, sizes)


def sizes_of(objective: torch.nn.Module, ranks: int) -> dict[str, int]:
    channels = [module.running_mean.numel() for module in objective.modules() if isinstance(module, GlobalBatchNorm)]
    parameters = sum(p.numel() for p in objective.parameters())
    return {"W": ranks, "b": B, "d": 5, "N": len(channels), "C": sum(channels), "P": parameters}


@pytest.mark.parametrize("ranks", WORLDS)
@pytest.mark.parametrize("name", ["eae", "ae", "vae", "wae", "sigreg", "swae"])
def test_training_step_moves_what_the_page_on_scaling_says(monkeypatch, name, ranks):
    config = configured(Path(), name)
    objective = build_objective(config.model, config.objective, SHAPE, 0)
    objective.row_counts = [B] * ranks
    images = torch.rand(B, *SHAPE, generator=torch.Generator().manual_seed(0))
    with world_of(ranks, monkeypatch) as traffic:
        objective(images, None, ranks * B, np.arange(B), 0)["loss"].backward()
        average_over_ranks(p.grad for p in objective.parameters())
    sizes = sizes_of(objective, ranks)
    expected = counted("batch norms", **sizes) + counted("gradients", **sizes)
    calls = {"allreduce_": 2 * sizes["N"] + 1}
    if name == "eae":
        expected += counted("entropy", **sizes)
        calls["_allgather_base_"] = 2
    if name == "wae":
        expected += counted("MMD", **sizes)
        calls = {"allreduce_": calls["allreduce_"] + 1, "_allgather_base_": 2}
    if name == "sigreg":
        expected += counted("Epps-Pulley statistic", m=config.objective.directions, **sizes)
        calls["allreduce_"] += 2
    if name == "swae":
        expected += counted("sliced Wasserstein", **sizes)
        calls = {"allreduce_": calls["allreduce_"] + 1, "_allgather_base_": 1}
    assert traffic.calls == calls
    assert traffic.received == traffic.sent == pytest.approx(expected)


@pytest.mark.parametrize("ranks", WORLDS)
def test_stop_question_costs_a_rank_two_bytes_however_many_there_are(monkeypatch, ranks):
    monkeypatch.setattr(dist, "new_group", lambda **_: dist.group.WORLD)
    with world_of(ranks, monkeypatch) as traffic, StopRequest(60) as stop:
        for _ in range(64):
            stop.start_asking()
            stop.asked()
    questions = counted("stop question", W=ranks, steps=64)
    assert traffic.calls == {"allreduce_": questions} and traffic.sent <= 2 * questions


@pytest.mark.parametrize("ranks", WORLDS)
def test_blocks_of_an_evaluation_move_nothing_and_its_moments_do_not_grow(monkeypatch, ranks):
    extractor = thumbnails()
    images = torch.from_numpy(np.stack([image_of(number).transpose(2, 0, 1) for number in range(12)]))
    traffics = []
    for blocks in (1, 3):
        walk = [(4 * block, images[4 * block : 4 * block + 4]) for block in range(blocks)]
        with world_of(ranks, monkeypatch) as traffic:
            describe(walk, extractor, 4, 0, torch.device("cpu"), "images")
        traffics.append(traffic)
    one, three = traffics
    assert one.calls == three.calls
    reduced = [traffic.moved["allreduce_"] for traffic in traffics]
    assert reduced[0] == reduced[1] == pytest.approx(counted("moments", W=ranks, f=64))


@pytest.mark.parametrize("ranks", WORLDS)
def test_search_exchanges_candidates_in_messages_that_do_not_grow(monkeypatch, ranks):
    monkeypatch.setattr(index_module, "BLOCK", 256)
    generator, k, m, d = np.random.default_rng(0), 5, 24, 6
    with world_of(ranks, monkeypatch):
        index = LatentIndex.build(generator.normal(size=(50, d)).astype(np.float32), "flat")
    with world_of(ranks, monkeypatch) as traffic:
        index.search(generator.normal(size=(m, d)).astype(np.float32), k)
    rounds = -(-m // max(256 // ranks, 1))
    assert traffic.calls["alltoall_base_"] == 2 * rounds
    assert traffic.moved["alltoall_base_"] == pytest.approx(counted("search: candidates", W=ranks, m=m, k=k))
    # Queries and their number in every round; the objects before them say what is asked.
    assert traffic.moved["_allgather_base_"] == pytest.approx(
        counted("search: queries", W=ranks, m=m, d=d) + 8 * (ranks - 1) * rounds
    )
    assert traffic.largest <= max(256, ranks) * max(8 * k, 4 * d)


@pytest.mark.parametrize("ranks", WORLDS)
def test_line_of_the_log_gathers_the_terms_of_its_steps(monkeypatch, ranks):
    window, names = [torch.ones(4, dtype=torch.float64)] * 10, ["loss", "entropy", FINITE_NORMS, "gradient_norm"]
    with world_of(ranks, monkeypatch) as traffic:
        averaged(window, names, 10, lambda: None, ignore_gradient=False)
    counts = 8 * (ranks - 1)  # of the rows that a rank sends
    assert traffic.received == counted("line of the log", W=ranks, steps=10, terms=4) + counts


@pytest.mark.parametrize("ranks", WORLDS)
def test_pictures_of_neighbors_are_gathered_in_messages_that_do_not_grow(monkeypatch, ranks):
    images = torch.arange(6 * 3 * 8 * 8, dtype=torch.uint8).view(6, 3, 8, 8)
    with world_of(ranks, monkeypatch) as traffic:
        from_their_ranks(images, np.array([5, 0, 2]))
    assert traffic.moved["allreduce_"] == pytest.approx(2 * (ranks - 1) / ranks * 3 * images[0].nbytes)
    assert traffic.received == traffic.moved["allreduce_"] + 8 * (ranks - 1)


def small_objects(monkeypatch, ranks: int) -> Counter:
    """The bytes that a rank receives of every other rank in pickles, by what is asked."""
    config, rows = configured(Path(), "eae"), np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    asked = {
        "settings": lambda: require_equal(flatten(config), "settings"),
        "work": lambda: on_every_rank(lambda: None),
        "machines": lambda: ranks_of_group("node"),
        "moments": lambda: describe([(0, images)], thumbnails(), 4, 0, torch.device("cpu"), "images"),
        "index": lambda: LatentIndex.build(rows, "flat"),
    }
    found = Counter()
    for what, work in asked.items():
        with world_of(ranks, monkeypatch) as traffic:
            work()
        found[what] = traffic.moved["allgather_"] / (ranks - 1)
    with world_of(ranks, monkeypatch):
        index = LatentIndex.build(rows, "flat")
    with world_of(ranks, monkeypatch) as traffic:
        index.search(rows[:4], 3)
    return found | Counter(search=traffic.moved["allgather_"] / (ranks - 1))


def test_small_objects_of_a_rank_do_not_grow_with_the_ranks(monkeypatch):
    of_two, of_many = small_objects(monkeypatch, 2), small_objects(monkeypatch, 1024)
    print({what: round(count) for what, count in of_two.items()})
    assert of_two.keys() == of_many.keys() and all(of_two.values())
    for what, count in of_two.items():
        assert abs(of_many[what] - count) <= 16, what  # a number of ranks takes more bytes
        assert count <= counted("pickles: the settings" if what == "settings" else "pickles: each other question", W=2), what


def note_hashes(shards: Path, run: Path) -> None:
    """What each rank hashes where a command opens a checkpoint and looks at its data three times."""
    hashed = []

    def noted(path: Path) -> str:
        hashed.append(Path(path).name)
        return sha256_of(path)

    checkpoint.sha256_of = shard_index.sha256_of = noted
    PartialState(cpu=True)
    opened = checkpoint.open_on_rank_zero(run)
    assert opened.state["step"] == 4 and opened.path.parent.name == "checkpoints"
    index = shard_index.ShardIndex.load(shards)
    for _ in range(3):
        list(walk(shards, "test", 8))
        index.split("test")
    tables = ["test.shards.npy", *(f"test-00000{shard}.members.npy" for shard in range(2))]
    assert sorted(hashed) == sorted([*(checkpoint.FILES if rank() == 0 else ()), *(name for name in hashed if name in tables)])
    assert all(hashed.count(name) <= 1 for name in hashed) and "test.shards.npy" in hashed


def test_checkpoint_is_verified_by_one_rank_and_a_table_once(shards, run, tmp_path):
    ended = run_ranks(2, tmp_path / "logs", note_hashes, shards, run)
    assert ended.codes == [0, 0], ended.said


def load_together(run: Path, damaged: Path) -> None:
    """What each rank reads of a checkpoint that all load, and what they find in it."""
    read = []

    def noted(original):
        return lambda path, *more, **options: read.append(Path(path).name) or original(path, *more, **options)

    alone = checkpoint.open_checkpoint(run)
    expected = {**alone.model_state(), "optimizer": alone.optimizer_state()}
    checkpoint.load_file, torch.load = noted(checkpoint.load_file), noted(torch.load)
    with ending_ranks():
        PartialState(cpu=True)
        together = checkpoint.open_on_rank_zero(run)
        found = {**together.model_state(), "optimizer": together.optimizer_state()}
        assert read == (["model.safetensors", "optimizer.pt"] if rank() == 0 else [])
        leaves, wanted = pytree.tree_leaves(found), pytree.tree_leaves(expected)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
        for one, other in zip(leaves, wanted, strict=True):
            same_layout = not isinstance(one, torch.Tensor) or (one.stride(), one.dtype) == (other.stride(), other.dtype)
            assert same_layout and (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other)
        print("the same on this rank", flush=True)
        checkpoint.open_on_rank_zero(damaged).optimizer_state()


def test_checkpoint_is_read_by_one_rank_and_sent_to_the_others(run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "damaged", symlinks=True)
    folder = checkpoint.open_checkpoint(damaged).path
    torch.save(Touch(tmp_path / "touched"), folder / "optimizer.pt")
    manifest = json.loads((folder / "manifest.json").read_text()) | {"optimizer.pt": sha256_of(folder / "optimizer.pt")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    ended = run_ranks(2, tmp_path / "logs", load_together, run, damaged)
    assert ended.codes == [1, 1] and all("the same on this rank" in said for said in ended.said), ended.said
    assert "error [rank 0]" in ended.said[0] and "optimizer.pt holds something else than tensors" in ended.said[0]
    assert "error" not in ended.said[1] and "Traceback" not in "".join(ended.said) and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("ranks", WORLDS)
def test_checkpoint_is_sent_to_a_rank_once_however_many_there_are(monkeypatch, ranks):
    weights = {"a": torch.ones(3, 4), "b": {0: [torch.ones(5), torch.tensor(2.0)]}, "step": 7}
    with world_of(ranks, monkeypatch) as traffic:
        assert tensors_from_rank_zero(weights)["step"] == 7
    with world_of(ranks, monkeypatch) as objects:
        from_rank_zero(7)
    assert traffic.calls["broadcast_"] == 3 + objects.calls["broadcast_"]
    assert 0 <= traffic.received - 4 * (12 + 5 + 1) < 2_000  # beside what stands for the tensors


def index_of(folder: Path, count: int) -> Path:
    """An index of so many shards, of which all have the content of one; only that one is there."""
    root = write_shards(folder / "many", {"train": (10,)})
    one, path = np.load(root / "train.shards.npy")[0], root / "train.shards.npy"
    table = np.zeros(count, dtype=[("name", "S22"), *SHARD_DTYPE])
    for field in one.dtype.names:
        table[field] = one[field]
    table["name"] = np.char.mod(b"train-%07d.tar", np.arange(count))
    np.save(path, table)
    info = json.loads((root / "index.json").read_text())
    info["splits"]["train"] |= {"samples": 10 * count, "shards": count, "table_sha256": sha256_of(path)}
    (root / "index.json").write_text(json.dumps(info))
    return root


@pytest.mark.parametrize("rank", [0, 1, 1023])
def test_start_on_1024_ranks_hashes_the_table_of_a_million_shards_once_a_rank(tmp_path, monkeypatch, rank):
    hashed, count = [], 10**6
    root = index_of(tmp_path, count)
    monkeypatch.setattr(shard_index, "sha256_of", lambda path: hashed.append(Path(path).stat().st_size) or sha256_of(path))
    read, begun = bytes_read(), time.process_time()
    stream = ShardStream(root, "train", 4096, rank=rank, world=1024)
    assert stream.rows == 4 and stream.samples == 10 * count
    shards = np.unique(stream.order.rows(np.arange(8), *stream.lane_range)[0])  # a thread reads ahead
    seconds, read = time.process_time() - begun, bytes_read() - read
    assert len(hashed) == 1 and hashed[0] == pytest.approx(counted("table of a split", S=count, name=22), abs=1_000)
    assert hashed[0] <= read < hashed[0] + 2**20  # the order of the samples reads it by its mapped memory
    for number in shards:
        for content in (shard := f"train-{number:07d}.tar", member_table(shard)):
            if not (root / content).exists():
                os.link(root / content.replace(f"{number:07d}", "000000"), root / content)
    with closing(iter(stream)) as batches:
        assert len(next(batches)["key"]) == 4
    stream.index.split("train")
    of_shards = hashed[1:]
    assert 4 <= len(of_shards) <= len(shards) and sum(of_shards) < 1_000 * len(shards)
    print(f"rank {rank}: {hashed[0]:,} bytes hashed, {read:,} read, {seconds:.2f} s of a CPU; then {sum(of_shards):,} of members")


def bytes_read() -> int:
    """What this process has read by system calls, from a disk or from memory."""
    return int(Path("/proc/self/io").read_text().split()[1])
