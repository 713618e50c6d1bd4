"""The service against its own model: images decoded per second for 32 clients that ask for 16 at a time, and by the bare model.

Model and clients share the machine: the service is a separate process with one thread for the model, and the clients are threads
here. Images travel as base64 PNG, compressed at level 1, in JSON.
"""

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import numpy as np
import psutil
import torch

from benchmarks.table import Row, Seconds, at_least
from eae_dist.config import load_config
from eae_dist.inference.trained_model import TrainedModel, load
from eae_dist.objectives import build_objective, resolve
from eae_dist.training import checkpoint as checkpoints

CLIENTS, LATENTS, BATCH = 32, 16, 256
# Network -> image shape, requests per client and round, rounds, the least share of the bare model's speed.
CASES = {"rae32": ((3, 32, 32), 2, 3, 0.6), "small": ((1, 32, 32), 16, 5, None)}


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    for network, (shape, requests, rounds, bound) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            run = save_run(Path(folder) / "run", network, shape)
            model, images = load(run), CLIENTS * requests * LATENTS
            ours, theirs, waits = [], [], []
            with service(run) as (process, port):
                ask_all(port, model.latent_dim, 1)  # warms up
                for _ in range(rounds):
                    theirs.append(bare(model, images))
                    before, start = cpu_of(process), time.perf_counter()
                    waits += ask_all(port, model.latent_dim, requests)
                    ours.append(Seconds(cpu_of(process) - before, time.perf_counter() - start))
        # Each turn is compared with the one next to it, because the machine's speed changes.
        wall = statistics.median(bare.wall / served.wall for bare, served in zip(theirs, ours, strict=True))
        cpu = statistics.median(bare.cpu / served.cpu for bare, served in zip(theirs, ours, strict=True))
        speeds = (f"{images / statistics.median(s.wall for s in seconds):,.0f} images/s" for seconds in (ours, theirs))
        columns = {} if bound is None else at_least(bound, wall)
        p50, p99 = np.percentile(waits, [50, 99])
        yield Row(
            f"/decode of {LATENTS} latents, {network}, {CLIENTS} clients: bare model, batch {BATCH}",
            *speeds,
            **columns | {"ratio": f"{wall:.2f}x"},
            beside=f"CPU {cpu:.2f}x; a request takes {p50:.2f} s, p99 {p99:.2f} s",
        )


def save_run(run: Path, network: str, shape: tuple[int, int, int]) -> Path:
    """Writes a checkpoint of initial weights."""
    config = resolve(load_config([f"model.network={network}", f"evaluate.batch={BATCH}"]), shape)
    objective = build_objective(config.model, config.objective, shape, seed=0)
    checkpoints.save(run, config, objective.state_dict(), {}, {"step": 0, "images": 0, "image_shape": list(shape)})
    return run


@contextmanager
def service(run: Path) -> Iterator[tuple[psutil.Process, int]]:
    """Yields the process and the port of a service of the run."""
    command = [sys.executable, "-m", "eae_dist.serve", "--ckpt", str(run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            yield psutil.Process(process.pid), next(int(m[1]) for line in process.stderr if (m := re.search(r":(\d+) \(", line)))
        finally:
            process.terminate()


def ask_all(port: int, dimensions: int, requests: int) -> list[float]:
    """Returns the seconds of each request; every client keeps its connection and asks again after each answer."""
    waits: list[float] = []

    def ask(number: int) -> None:
        latents = np.random.default_rng(number).normal(size=(LATENTS, dimensions)).tolist()
        connection, body = http.client.HTTPConnection("127.0.0.1", port), json.dumps({"latents": latents})
        for _ in range(requests):
            start = time.perf_counter()
            connection.request("POST", "/decode", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            images = json.loads(answer.read())["images"]
            assert answer.status == 200 and len(images) == LATENTS
            waits.append(time.perf_counter() - start)
        connection.close()

    clients = [Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert len(waits) == CLIENTS * requests
    return waits


@torch.no_grad()
def bare(model: TrainedModel, images: int) -> Seconds:
    """Returns the time in which the model decodes this many images."""
    latents = torch.randn(images, model.latent_dim, generator=torch.Generator().manual_seed(0))
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in latents.split(BATCH):
        model.decode(batch)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall)


def cpu_of(process: psutil.Process) -> float:
    """Returns the CPU time of a process."""
    times = process.cpu_times()
    return times.user + times.system
