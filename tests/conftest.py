"""Small data sets that the tests write themselves, and one launch of world.py per number of ranks and test session."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from accelerate import PartialState
from accelerate.state import AcceleratorState
from PIL import Image
from ranks import run_ranks, run_script
from run_folders import save_run
from torch import nn
from world_cases import configured

from eae_dist.data.indexing import build_index
from eae_dist.metrics import inception

torch.set_num_threads(1)  # the tests' tensors are small; on a busy machine threads that wait for each other crawl
ROOT = Path(__file__).parent.parent
TRAIN_SIZES = (40, 37, 0, 1, 72)  # uneven, empty and single shards are ordinary shards; N = 150


def image_of(number: int, shape=(1, 16, 16)) -> np.ndarray:
    """A smooth random picture, uint8 [h, w, c], that tells its number: equal for equal numbers, different for others."""
    channels, height, width = shape
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, size=(4, 4, channels)).astype(np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BILINEAR)) for c in range(channels)],
        -1,
    )


def encode(pixels: np.ndarray, extension: str) -> bytes:
    file = io.BytesIO()
    if extension == "npy":
        np.save(file, pixels)
    else:
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(file, extension, lossless=True)
    return file.getvalue()


def write_shards(
    root: Path,
    sizes: dict[str, tuple[int, ...]],
    shape=(1, 16, 16),
    extension: str = "png",
    members: dict[str, bytes] | None = None,
) -> Path:
    """Shards with the given numbers of samples, numbered through within a split from 0, labels modulo 10; indexed.

    members: what every sample holds besides, by extension.
    """
    root.mkdir(parents=True)
    for number, (split, shards) in enumerate(sizes.items()):
        sample = 0
        for shard, size in enumerate(shards):
            with wds.TarWriter(str(root / f"{split}-{shard:06d}.tar"), encoder=False, mtime=0) as tar:
                for _ in range(size):
                    pixels = image_of(10_000 * number + sample, shape)
                    own = {extension: encode(pixels, extension), "cls": b"%d" % (sample % 10)}
                    tar.write({"__key__": f"{sample:06d}", **own, **(members or {})})
                    sample += 1
    build_index(root)
    return root


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Under `pytest -n`, one worker runs all tests of a file, and one worker all tests that use the launches of `world`."""
    for item in items:
        item.add_marker(pytest.mark.xdist_group("world" if "world" in item.fixturenames else str(item.path)))


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """150 training, 40 validation and 33 test images of 1x16x16."""
    sizes = {"train": TRAIN_SIZES, "validation": (40,), "test": (20, 13)}
    return write_shards(tmp_path_factory.mktemp("data") / "shards", sizes)


def rank_environment() -> dict[str, str]:
    """The environment of a launched rank: one thread, this checkout importable, a store of its own for each start."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(ranks: int, *command: str, timeout: float = 300) -> subprocess.CompletedProcess:
    """Runs `command` (a script or -m module, with arguments) on so many local ranks and returns its output."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *command]
    return subprocess.run(launcher, env=rank_environment(), cwd=ROOT, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="session")
def fid_case(tmp_path_factory) -> Path:
    """Weights in the layout of pytorch-fid's file, where torch's hub would keep them under this folder, and images in a/ and b/.

    They are random, but with features that differ. As initialized the features would be 1e-8 and every distance 0: so the
    convolutions keep the scale, and the batch norms of the first layers take their statistics from some images.
    """
    torch.manual_seed(0)
    network = inception.inception_layout()
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    stem = nn.Sequential(network.Conv2d_1a_3x3, network.Conv2d_2a_3x3, network.Conv2d_2b_3x3).train()
    pixels = np.stack([image_of(number, (3, 32, 32)) for number in range(500, 524)])
    with torch.no_grad():
        stem(inception.PREPROCESSING["pytorch-fid"][0](torch.from_numpy(pixels).permute(0, 3, 1, 2)))
    folder = tmp_path_factory.mktemp("fid")
    (weights := folder / "hub" / "checkpoints" / inception.INCEPTION_FILE).parent.mkdir(parents=True)
    torch.save(network.state_dict(), weights)
    for name, start, noise in (("a", 0, 0), ("b", 1000, 12)):
        (folder / name).mkdir()
        rng = np.random.default_rng(start)
        for number in range(start, start + 80):
            pixels = image_of(number, (3, 32, 32)) + noise * rng.standard_normal((32, 32, 3))
            Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory, shards, fid_case):
    """world(W): what the cases of tests/world.py returned on rank 0 of W ranks; launched once a session and W."""
    results, folder = {}, tmp_path_factory.mktemp("world")

    def results_of(ranks: int) -> dict:
        if ranks not in results:
            if ranks != 2:
                results_of(2)  # its run folder is what the others continue
            out = folder / f"world-{ranks}.pt"
            arguments = (str(ROOT / "tests" / "world.py"), str(out), str(shards), str(folder), str(fid_case))
            ended = run_ranks(ranks, folder / f"logs-{ranks}", run_script, *arguments, timeout=900)
            assert ended.codes == [0] * ranks, "\n".join(text[-3000:] for text in ended.said)
            results[ranks] = torch.load(out, weights_only=True)
        return results[ranks]

    return results_of


@pytest.fixture
def cpu():
    """accelerate keeps the device in a global, which other tests may have set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def run(shards, tmp_path) -> Path:
    return save_run(tmp_path / "run", configured(shards, "eae"))
