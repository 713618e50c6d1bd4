"""The scripts of launch/ on a SLURM cluster of two nodes, which these tests start on this machine."""

import csv
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cluster import Cluster, running_cluster, wait_until
from conftest import ROOT, rank_environment
from safetensors.torch import load_file

BATCH, STEPS = 26, 14


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder: a socket's path may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, running_cluster(Path(folder)) as running:
        yield running


def environment(cluster: Cluster, **more: str) -> dict[str, str]:
    """What a user's shell has at sbatch: this interpreter, this checkout, and the address of a first node that no DNS knows."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = rank_environment()
    python_path = os.pathsep.join([str(ROOT / "tests" / "slurm"), own["PYTHONPATH"]])
    return own | {"PATH": path, "PYTHONPATH": python_path, "MASTER_ADDR": "127.0.0.1", "LOGS": f"{cluster.folder}/logs"} | more


class Training:
    """A job of launch/train.sbatch on two nodes with a rank each, in a folder of its own."""

    def __init__(self, cluster: Cluster, folder: Path, shards: Path, stops: int):
        """stops: in how many starts it waits for SIGTERM in the third step."""
        self.cluster, self.folder, self.run = cluster, folder, folder / "run"
        folder.mkdir()
        settings = [
            f"data.root={shards}",
            f"train.output={self.run}",
            "train.device=cpu",
            "train.timeout=60",
            "train.trackers=[]",
        ]
        settings += [f"train.global_batch={BATCH}", f"train.epochs={STEPS * BATCH / 150}", "model.width=4", "model.latent_dim=5"]
        self.job = cluster.submit(
            *("--nodes", "2", "launch/train.sbatch", *settings, "model.encoder=witness:WitnessEncoder"),
            environment=environment(cluster, WITNESS_FOLDER=str(folder), WITNESS_STOPS=str(stops)),
            cwd=ROOT,
        )

    def wait_for_stop(self, start: int) -> None:
        """Waits until the job waits for SIGTERM, in this start of it."""
        waiting = self.folder / f"waiting-{start}"
        wait_until(waiting.exists, lambda: f"{waiting}: {self.cluster.job(self.job)}\n{self.cluster.said()}")

    def wait_for_end(self) -> dict[str, str]:
        ended = self.cluster.wait_for_end(self.job)
        assert ended["JobState"] == "COMPLETED", self.cluster.said()
        return ended

    def log(self, rank: int) -> str:
        return (self.cluster.folder / "logs" / self.job / f"rank-{rank}.log").read_text()

    def images(self, rank: int) -> list[str]:
        """What stands for the images of each step that this rank took, in their order."""
        return (self.folder / f"images-{rank}").read_text().split()

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(self.run / "checkpoints" / "latest" / "model.safetensors")


@pytest.fixture(scope="session")
def undisturbed(cluster, shards, tmp_path_factory) -> Training:
    training = Training(cluster, tmp_path_factory.mktemp("undisturbed") / "job", shards, stops=0)
    assert training.wait_for_end()["Restarts"] == "0"
    return training


def test_job_on_two_nodes_trains_and_each_rank_has_a_log(undisturbed):
    assert "batch 26 over 2 rank(s), steps 0 to 14" in undisturbed.log(0) and f"finished {undisturbed.run}" in undisturbed.log(0)
    assert undisturbed.log(1) == ""  # rank 0 speaks for both
    assert [len(undisturbed.images(rank)) for rank in (0, 1)] == [STEPS, STEPS]
    assert (undisturbed.run / "checkpoints" / "latest").resolve().name == f"step-{STEPS:08d}"


def end_of_time(cluster: Cluster, job: str) -> None:
    """What SLURM does two minutes before a job's time is over."""
    cluster.command("scancel", "--batch", "--signal=USR1", job)


def requeue(cluster: Cluster, job: str) -> None:
    cluster.command("scontrol", "requeue", job)


def preemption(cluster: Cluster, job: str) -> None:
    """A job with precedence that wants both nodes."""
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true", environment={}, cwd=cluster.folder)


def test_stopped_job_saves_is_queued_again_and_ends_with_the_bits_of_an_undisturbed_one(cluster, undisturbed, shards, tmp_path):
    disturbances = (preemption, end_of_time, requeue)
    training = Training(cluster, tmp_path / "job", shards, stops=len(disturbances))
    for start, disturb in enumerate(disturbances):
        training.wait_for_stop(start)
        # Or a failure after a preemption would be taken for another one.
        assert cluster.job(training.job)["PreemptTime"] == "None"
        disturb(cluster, training.job)
    assert training.wait_for_end()["Restarts"] == str(len(disturbances))
    saved = re.findall(r"with its launcher, at step (\d+) of 14; saved in", training.log(0))
    assert len(saved) == len(disturbances)
    assert re.findall(r"steps (\d+) to 14", training.log(0)) == ["0", *saved]
    for rank in (0, 1):
        assert training.images(rank) == undisturbed.images(rank)
    expected, found = undisturbed.weights(), training.weights()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_job_that_fails_is_not_queued_again_and_says_where_the_reason_stands(cluster, tmp_path):
    arguments = ("launch/train.sbatch", "data.root=/nowhere", f"train.output={tmp_path}/run")
    job = cluster.submit(*arguments, environment=environment(cluster), cwd=ROOT)
    ended = cluster.wait_for_end(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    log = cluster.folder / "logs" / job
    assert f"what the ranks say is in {log}/rank-*.log" in (cluster.folder / f"{job}.out").read_text()
    assert "data.root=/nowhere does not exist" in (log / "rank-0.log").read_text()


def test_evaluation_of_a_job_on_two_nodes(cluster, undisturbed, tmp_path):
    arguments = ["--ckpt", str(undisturbed.run), "--out", str(tmp_path / "evaluation"), "model.encoder=witness:WitnessEncoder"]
    small = ["evaluate.components=2", f"evaluate.cache={tmp_path}/cache"]
    job = cluster.submit(
        *("--nodes", "2", "launch/evaluate.sbatch", *arguments, *small),
        environment=environment(cluster),
        cwd=ROOT,
    )
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED", cluster.said()
    assert (tmp_path / "evaluation" / "metrics.json").is_file()


def test_array_trains_and_judges_three_rows_and_the_table_command_finds_them_finished(cluster, shards, tmp_path):
    config, rows = tmp_path / "tiny.yaml", ("ae", "eae", "rae")
    config.write_text(
        f"data:\n  root: {shards}\nmodel:\n  width: 4\n  latent_dim: 5\n"
        f"train:\n  global_batch: 26\n  epochs: 0.3\n  trackers: []\n  device: cpu\n"
        f"evaluate:\n  components: 2\n  cache: {tmp_path}/cache\n"
    )
    (tmp_path / "tiny").mkdir()
    for row in rows:
        (tmp_path / "tiny" / f"{row}.yaml").write_text(f"objective:\n  name: {row}\n")
    arguments = [str(config), "--out", str(tmp_path / "table")]
    job = cluster.submit(
        *("--array", "0-2", "launch/table_array.sbatch", *arguments),
        environment=environment(cluster),
        cwd=ROOT,
    )
    for index in range(3):
        assert cluster.wait_for_end(f"{job}_{index}")["JobState"] == "COMPLETED", cluster.said()
    command = [sys.executable, "-m", "eae_dist.table", *arguments]
    done = subprocess.run(command, env=environment(cluster), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr.count("is finished") == 3, done.stderr[-4000:]
    with open(tmp_path / "table" / "table.csv") as file:
        assert {line["model"] for line in csv.DictReader(file)} == set(rows)
