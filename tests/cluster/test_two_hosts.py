"""Two hosts without a scheduler: network namespaces that a virtual cable joins, torchrun in each, and a cable that is pulled."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT, rank_environment
from safetensors.torch import load_file
from world_cases import BATCH

STEPS, BROKEN, PORT = 12, 7, 29571
CABLE = "eae0"


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[tuple[str, str]]]:
    """Name and address of each."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs root and the command ip (package iproute2) to make network namespaces")
    names = [f"eae-{os.getpid()}-{number}" for number in range(2)]
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", CABLE, "netns", names[0], "type", "veth", "peer", "name", CABLE, "netns", names[1])
        for name, address in zip(names, addresses, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
        yield list(zip(names, addresses, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def trained(hosts: list[tuple[str, str]], shards: Path, run: Path, timeout: float, pulled: str = "") -> list[tuple[int, str]]:
    """Exit status and words of the two torchruns; `pulled`: what the second host's rank runs in step BROKEN, once."""
    settings = [
        f"data.root={shards}",
        f"train.output={run}",
        f"train.global_batch={BATCH}",
        f"train.epochs={STEPS * BATCH / 150}",
        f"train.save_every={5 * BATCH}",
        "train.validate_every=1000000",
        "train.sample_every=1000000",
        "train.device=cpu",
        "train.trackers=[]",
        f"train.timeout={timeout}",
        "model.encoder=saboteur:CommandingEncoder",
        "train.learning_rate=1e-3",
        "model.width=4",
        "model.latent_dim=5",
    ]
    environment = rank_environment() | {
        "GLOO_SOCKET_IFNAME": CABLE,
        "SABOTEUR_MARK": f"{run}.mark",
        "SABOTEUR_STEP": str(BROKEN),
        "SABOTEUR_COMMAND": pulled,
    }
    started = []
    for number, (name, _) in enumerate(hosts):
        place = ["--nnodes=2", f"--node-rank={number}", f"--master-addr={hosts[0][1]}", f"--master-port={PORT}"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node=1", "-m", "eae_dist.train"]
        command = ["ip", "netns", "exec", name, *torchrun, *settings]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=environment, cwd=ROOT, **pipes))
    try:
        said = [process.communicate(timeout=150)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, words) for process, words in zip(started, said, strict=True)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(hosts, shards, tmp_path_factory) -> dict[str, torch.Tensor]:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    for status, said in trained(hosts, shards, run, timeout=60):
        assert status == 0, said[-4000:]
    return weights(run)


def test_cable_that_is_out_for_a_moment_costs_nothing_but_the_moment(hosts, undisturbed, shards, tmp_path):
    pulled = f"ip link set {CABLE} down; sleep 3; ip link set {CABLE} up"
    ended = trained(hosts, shards, tmp_path / "run", 60, pulled)
    assert [status for status, _ in ended] == [0, 0], ended
    assert (tmp_path / "run.mark").exists()
    found = weights(tmp_path / "run")
    assert all(torch.equal(found[name], expected) for name, expected in undisturbed.items())


def test_cable_that_stays_out_ends_both_hosts_in_time_and_the_same_command_goes_on(hosts, undisturbed, shards, tmp_path):
    run = tmp_path / "run"
    ended = trained(hosts, shards, run, 5, f"ip link set {CABLE} down")
    assert all(status != 0 for status, _ in ended) and (tmp_path / "run.mark").exists()
    for number, (_, said) in enumerate(ended):
        assert f"rank {number} of 2" in said and f"could not go on in step {BROKEN}" in said and "ended or hangs" in said, said[
            -4000:
        ]
    ip("-n", hosts[1][0], "link", "set", CABLE, "up")
    for status, said in trained(hosts, shards, run, 60):
        assert status == 0, said[-4000:]
    found = weights(run)
    assert all(torch.equal(found[name], expected) for name, expected in undisturbed.items())
