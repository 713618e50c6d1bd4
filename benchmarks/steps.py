"""The cost of training steps on shards, on every rank that a launcher starts, as one line of JSON from rank 0.

    [torchrun ...] -m benchmarks.steps ROUNDS STEPS [key=value ...]

It runs the loop of `eae_dist.train` (its stream, objective, step, stop request and averages for the log) without validation,
pictures and checkpoints. A round is STEPS steps; the first round is not counted. On one rank, it also measures the entropy term
of 1,024 latents alone.
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch

from eae_dist.config import Config, load_config
from eae_dist.data.shard_index import ShardIndex
from eae_dist.distributed import StopRequest, barrier, gather_objects, rank, world_size
from eae_dist.losses.entropy import knn_entropy
from eae_dist.objectives import build_objective, resolve
from eae_dist.training.compilation import set_execution
from eae_dist.training.engines import engine_of
from eae_dist.training.loop import training_step
from eae_dist.training.metrics_log import averaged
from eae_dist.training.optimization import build_optimizer
from eae_dist.training.setup import open_stream, set_blocks, start_accelerator

ENTROPY_ROWS = 1024


def main() -> None:
    """Runs the command line."""
    rounds, steps = int(sys.argv[1]), int(sys.argv[2])
    config = load_config(sys.argv[3:])
    config = resolve(config, ShardIndex.load(config.data.root).image_shape)
    with training(config) as take_steps:
        costs = [seconds(lambda: take_steps(steps)) for _ in range(rounds + 1)]
    images = steps * config.train.global_batch
    report = {"rounds": [{name: value / images for name, value in cost.items()} for cost in costs[1:]]}
    if world_size() == 1:
        latents = torch.randn(ENTROPY_ROWS, config.model.latent_dim, requires_grad=True)
        report["entropy"] = [seconds(lambda: torch.autograd.grad(knn_entropy(latents), latents)) for _ in range(10)][1:]
    if rank() == 0:
        print(json.dumps(report))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def training(config: Config) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes steps of a new run of a resolved configuration. Call it on every rank."""
    accelerator = start_accelerator(config.train)
    stream = open_stream(config)
    objective = build_objective(config.model, config.objective, stream.index.image_shape, config.train.seed)
    set_blocks(objective, config, stream)
    set_execution(objective, config.train, accelerator.device)
    optimizer = build_optimizer(objective.parameters(), config.train)
    model, optimizer = engine_of(accelerator).prepare(objective, optimizer, config, stream.lanes)
    step = 0

    def take_steps(count: int) -> None:
        nonlocal step
        window = []
        for _ in range(count):
            stop.start_asking()
            names, terms = training_step(accelerator, model, optimizer, next(batches), stream.row_ids, step, config.train)
            window.append(terms)
            stop.asked()
            step += 1
        averaged(window, names, step, lambda: None, ignore_gradient=False)

    with StopRequest(config.train.timeout) as stop, closing(iter(stream)) as batches:
        yield take_steps


def seconds(work: Callable[[], object]) -> dict[str, float]:
    """Returns the user and system time of all ranks together, and the wall time of the slowest. Call it on every rank."""
    barrier()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    every = gather_objects((after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime, wall))
    user, system, walls = zip(*every, strict=True)
    return {"user": sum(user), "system": sum(system), "wall": max(walls)}


if __name__ == "__main__":
    main()
