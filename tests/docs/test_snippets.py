"""Every Python block of the pages runs as it stands; two ranks run those that start with a torchrun command.

The pages of docs/results are left out: their blocks need the runs that these pages report.
"""

import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import ROOT, rank_environment, write_shards
from pages import PAGES, Block, blocks, name_of
from run_folders import save_run
from world_cases import configured

from eae_dist.encode import encode
from eae_dist.evaluate import evaluate
from eae_dist.training.checkpoint import mark_best

RUN = [page for page in PAGES if page.parent.name != "results"]
SHAPE = (1, 32, 32)  # of mnist5k, which the tiny data set stands for
TWO_RANKS = "# torchrun --nproc-per-node 2"
RUNNER = str(Path(__file__).with_name("run_blocks.py"))
USE_OF_THE_ADDITIONS = """
from eae_dist import evaluate, pack, train

assert pack.main(["digits", "shards/digits", "--workers", "1"]) == 0  # other workers do not know the source
settings = ["data.root=shards/digits", "train.epochs=1", "train.device=cpu", "train.trackers=[]", "model.width=4"]
train.main([*settings, "objective.name=sparse_ae", "objective.latent_weight=0.1", "train.output=runs/sparse"])
judged = ["evaluate.features=pixels", "evaluate.densities=[diagonal]", "evaluate.count=60", "evaluate.cache=cache"]
evaluate.main(["--ckpt", "runs/sparse", *judged])
"""


def snippets(page: Path, two_ranks: bool) -> list[Block]:
    python = [block for block in blocks(page) if block.language == "python"]
    return [block for block in python if block.text.startswith(TWO_RANKS) == two_ranks]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with shards/mnist5k, a run in runs/mnist5k-eae with fitted densities, and its latents."""
    folder = tmp_path_factory.mktemp("snippets")
    sizes = {"train": (100, 100, 100, 100), "validation": (40,), "test": (40,)}
    config = configured(write_shards(folder / "shards" / "mnist5k", sizes, SHAPE), "eae")
    run = save_run(folder / "runs" / "mnist5k-eae", config, SHAPE)
    mark_best(run, 4)
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    evaluate(run, [])
    encode(run, run / "latents", [])
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def run(snippets: list[Block], folder: Path, scripts: Path, launcher: list[str], timeout: float) -> str:
    """Runs the snippets in the folder, in one call of the launcher; returns what was printed, and fails with the end of it."""
    command = [*launcher, RUNNER]
    with ExitStack() as sockets:
        for block in snippets:
            (script := scripts / block.place.replace("/", "-").replace(":", "-")).write_text(block.text)
            free = sockets.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            command += [str(free.getsockname()[1]), str(script)]
    environment = rank_environment() | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("page", [page for page in RUN if snippets(page, two_ranks=False)], ids=name_of)
def test_snippets_of_a_page_run_as_they_stand(page, folder, tmp_path):
    run(snippets(page, two_ranks=False), folder, tmp_path, [sys.executable], timeout=120)


def test_snippets_for_two_ranks_run_on_two_ranks(folder, tmp_path):
    found = [block for page in RUN for block in snippets(page, two_ranks=True)]
    assert found
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run(found, folder, tmp_path, launcher, timeout=180)


def test_search_of_embeddings_runs_as_it_is_pasted(tmp_path):
    shell = [block.text for block in blocks(ROOT / "docs" / "search.md") if block.language == "bash"]
    (text,) = [text for text in shell if "embeddings.npy" in text]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # where python is this one
    environment, command = rank_environment() | {"PATH": path, "CUDA_VISIBLE_DEVICES": ""}, ["bash", "-euc", text]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "5,000 embeddings of 64 dimensions" in done.stdout and "2:\n    1.0000  2\n" in done.stdout
    names = {"embeddings.faiss", "embeddings-neighbors/duplicates.csv", "embeddings-neighbors/query.csv"}
    assert all((tmp_path / name).is_file() for name in names)


def test_additions_of_contributing_are_packed_trained_and_judged(tmp_path):
    added = snippets(ROOT / "CONTRIBUTING.md", two_ranks=False)
    assert len(added) == 4
    whole = Block("python", "".join(block.text for block in added) + USE_OF_THE_ADDITIONS, "CONTRIBUTING.md")
    (work := tmp_path / "work").mkdir()
    printed = run([whole], work, tmp_path, [sys.executable], timeout=180)
    assert "kd_pixels_192" in printed and "\ndiagonal " in printed


def test_network_of_data_md_is_trained_and_judged_where_its_name_is_given(folder, tmp_path):
    (network,) = snippets(ROOT / "docs" / "data.md", two_ranks=False)
    name = network.text.splitlines()[0].removeprefix("# ")
    assert name == "mine/networks.py"
    (folder / name).parent.mkdir()
    (folder / name).write_text(network.text)
    settings = ["train.epochs=0.2", "train.device=cpu", "train.trackers=[]", "evaluate.features=thumbnails"]
    named = "model.encoder=mine.networks:Encoder"
    use = f"""
import sys

import thumbnails

sys.path.insert(0, "")
from eae_dist import evaluate, load, train

train.main([*{settings}, "{named}", "train.output=runs/mine"])
evaluate.main(["--ckpt", "runs/mine", "{named}", "evaluate.densities=[isotropic]", "evaluate.cache=cache"])
assert load("runs/mine", allow=["mine.networks:Encoder"]).autoencoder.encoder.__class__.__name__ == "Encoder"
"""
    run([Block("python", use, "use.py")], folder, tmp_path, [sys.executable], timeout=120)
