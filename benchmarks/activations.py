"""A forward and backward pass of rae64 with and without train.checkpoint_activations: peak memory and CPU time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.entropy import peak_memory_mib
from benchmarks.table import Row
from eae_dist.config import ModelConfig
from eae_dist.model.autoencoder import build_autoencoder, resolve_model
from eae_dist.training.compilation import checkpoint_activations

BATCH, SHAPE = 32, (3, 64, 64)


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    twice, once = (measured(checkpointed) for checkpointed in (True, False))
    yield Row(
        f"rae64, forward and backward of {BATCH} images 64x64: activations kept and computed twice, all kept",
        f"{twice['mib']:,.0f} MiB",
        f"{once['mib']:,.0f} MiB",
        f"{twice['mib'] / once['mib']:.2f}x",
        beside=f"beyond weights and gradients; CPU time {twice['seconds'] / once['seconds']:.2f}x",
    )


def measured(checkpointed: bool) -> dict[str, float]:
    """Returns the MiB that the first pass adds to the peak, and the CPU seconds of the second pass.

    It measures in a separate process.
    """
    program = f"from benchmarks import activations; activations.print_measured({checkpointed})"
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # so that freed memory leaves the process
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout)


def print_measured(checkpointed: bool) -> None:
    """Measures in this process and prints the result as JSON."""
    import torch
    import torch._dynamo  # 150 MiB that activation checkpoints and every optimizer import

    torch.set_num_threads(1)
    model = build_autoencoder(resolve_model(ModelConfig("rae64"), SHAPE), SHAPE, latent_norm=True)
    if checkpointed:
        checkpoint_activations(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # zeros would not yet take memory
    images = torch.rand(BATCH, *SHAPE)
    before, costs = peak_memory_mib(), []
    for _ in range(2):
        start = time.process_time()
        (model.decode(model.encode(images)) - images).square().sum().backward()
        costs.append((peak_memory_mib() - before, time.process_time() - start))
    print(json.dumps({"mib": costs[0][0], "seconds": costs[1][1]}))
