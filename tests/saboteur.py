"""What breaks runs: encoders, given to one as a user's own network, that do at a chosen step, and a pickle that runs code."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import torch
from torch.nn.functional import dropout

from eae_dist.distributed import rank, world_size
from eae_dist.model.networks import NETWORKS, ConvDecoder, ConvEncoder


class CountingEncoder(ConvEncoder):
    """The small encoder, which counts its training steps; the two backward passes of the rehearsal come first.

    SABOTEUR_STEP: the number of one, or `validation` for the first block of one. It breaks nothing before the file
    SABOTEUR_AWAITS is there, if one is named: what a thread is writing when a process is killed is lost.
    """

    def __init__(self, *, image_shape, latent_dim, width, bias):
        norm = {"eps": 1e-3, "momentum": 0.1}
        super().__init__(NETWORKS["small"], image_shape, latent_dim, width, bias=bias, norm=norm)
        self.calls = -2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        now = str(self.calls) if self.training else "validation"
        if now == os.environ.get("SABOTEUR_STEP", "7") and rank() == world_size() - 1:
            while not Path(os.environ.get("SABOTEUR_AWAITS", "/")).exists():
                time.sleep(0.01)
            return self.sabotage(super().forward(x))
        return super().forward(x)


class DivergingEncoder(CountingEncoder):
    """Not a number in step 7 of the last rank."""

    def sabotage(self, h: torch.Tensor) -> torch.Tensor:
        return h * float("nan")


class KillingEncoder(CountingEncoder):
    """Signals (SABOTEUR_SIGNAL) the last rank, or with SABOTEUR_TARGET=launcher its parent, once: SABOTEUR_MARK tells."""

    def sabotage(self, h: torch.Tensor) -> torch.Tensor:
        mark = Path(os.environ["SABOTEUR_MARK"])
        if not mark.exists():
            mark.touch()
            target = os.getppid() if os.environ.get("SABOTEUR_TARGET") == "launcher" else os.getpid()
            os.kill(target, getattr(signal, os.environ["SABOTEUR_SIGNAL"]))
        return h


class CommandingEncoder(CountingEncoder):
    """Runs a shell command (SABOTEUR_COMMAND) in step 7 of the last rank, once: SABOTEUR_MARK tells."""

    def sabotage(self, h: torch.Tensor) -> torch.Tensor:
        mark = Path(os.environ["SABOTEUR_MARK"])
        if not mark.exists():
            mark.touch()
            subprocess.run(os.environ["SABOTEUR_COMMAND"], shell=True, check=True)
        return h


class DroppingEncoder(CountingEncoder):
    """Breaks nothing, but has a random layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dropout(super().forward(x), 0.1, self.training)

    def sabotage(self, h: torch.Tensor) -> torch.Tensor:
        return h


class HangingEncoder(CountingEncoder):
    """Does not come back from step 7 of the last rank."""

    def sabotage(self, h: torch.Tensor) -> torch.Tensor:
        while True:
            signal.pause()


class FailingEncoder(CountingEncoder):
    """Fails in step 7 of the last rank at something that nobody has foreseen."""

    def sabotage(self, h: torch.Tensor) -> torch.Tensor:
        raise KeyError("unforeseen")


def trouble(at: str | None = None) -> None:
    """Fails as SABOTEUR_KIND says on rank SABOTEUR_RANK: in the training step SABOTEUR_STEP, or outside of training at once."""
    kind = os.environ.get("SABOTEUR_KIND")
    if kind is None or rank() != int(os.environ["SABOTEUR_RANK"]) or at not in (None, os.environ["SABOTEUR_STEP"]):
        return
    if kind == "ValueError":
        dict([(1, 2, 3)])  # as a bug in a network raises it
    if kind == "RuntimeError":
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    if kind == "OSError":
        raise OSError("the server of this network does not answer")
    if kind == "no file":
        Path("/nowhere/weights.pt").read_bytes()
    if kind == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    while kind == "hanging":
        signal.pause()


class TroubledEncoder(ConvEncoder):
    """The small encoder, in which there is trouble."""

    def __init__(self, *, image_shape, latent_dim, width, bias):
        norm = {"eps": 1e-3, "momentum": 0.1}
        super().__init__(NETWORKS["small"], image_shape, latent_dim, width, bias=bias, norm=norm)
        self.calls = -2  # the two backward passes of the rehearsal come first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        trouble(str(self.calls) if self.training else None)
        return super().forward(x)


class TroubledDecoder(ConvDecoder):
    """The small decoder, in which there is trouble outside of training."""

    def __init__(self, *, image_shape, latent_dim, width):
        super().__init__(NETWORKS["small"], image_shape, latent_dim, width, norm={"eps": 1e-3, "momentum": 0.1})

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if not self.training:
            trouble()
        return super().forward(z)


def killing_features(images: torch.Tensor) -> torch.Tensor:
    """Some pixels; kills the last rank, once, when an evaluation (SABOTEUR_PROGRESS) has compared two sets of images."""
    mark, progress = (Path(os.environ[name]) for name in ("SABOTEUR_MARK", "SABOTEUR_PROGRESS"))
    last = rank() == world_size() - 1
    if last and not mark.exists() and progress.is_file() and len(json.loads(progress.read_text())["sets"]) >= 2:
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return images.flatten(1)[:, ::37].float() / 255


class Touch:
    """A pickle of this creates a file when it is loaded by someone who trusts it."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)
