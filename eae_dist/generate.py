"""Draws images from a trained model:

    python -m eae_dist.generate --ckpt DIR [--density NAME] [--count N] [--nproc N] OUT [key=value ...]

It writes OUT/000000.png and so on; image i depends on (evaluate.seed, i) alone, on any number of ranks. The same command finishes
a folder that was begun. Densities other than isotropic must have been fitted by `python -m eae_dist.evaluate`.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from eae_dist.config import is_assignment
from eae_dist.distributed import on_every_rank, on_rank_zero
from eae_dist.distributed.launch import run_on_ranks
from eae_dist.errors import UserError
from eae_dist.inference.judged_checkpoint import evaluation_config, named_networks
from eae_dist.inference.trained_model import decoded, sample_seeds, trained_model
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.json_files import read_json, sealed
from eae_dist.report.grids import png_bytes
from eae_dist.training.checkpoint import open_on_rank_zero
from eae_dist.training.setup import how_to_judge


def generate(directory: Path, out: Path, density: str, count: int, assignments: Sequence[str]) -> None:
    """Writes `count` images; call it on every rank. Raises ValueError or OSError for what a user can correct."""
    checkpoint = open_on_rank_zero(directory)
    settings = evaluation_config(checkpoint, assignments).evaluate
    if count < 1:
        raise UserError(f"--count={count} must be at least 1")
    device = PartialState().device
    model = trained_model(checkpoint, device, named_networks(assignments))
    drawn_from = model.density(density)

    def latents(numbers: np.ndarray) -> torch.Tensor:
        return drawn_from.sample(sample_seeds(settings.seed, numbers))

    about = {"model_sha256": checkpoint.model_sha256, "density": density, "count": count}
    about |= {"seed": settings.seed, "batch": settings.batch}
    begun = out / ".generating.json"
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            start_folder(out, begun, about)

    def write() -> None:
        for first, images in decoded(model.autoencoder, latents, count, settings.batch, device, f"drawing from {density}"):
            for number, pixels in enumerate(images.permute(0, 2, 3, 1).cpu().numpy(), start=first):
                image = Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels)
                replace_file(out / f"{number:06d}.png", png_bytes(image))

    on_every_rank(write)
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            begun.unlink()


def start_folder(out: Path, begun: Path, about: dict) -> None:
    """Makes the folder, or takes one in which the same images were begun, as before a full disk. Raises ValueError or OSError.

    begun: the file that says which images are being written.
    """
    out.mkdir(parents=True, exist_ok=True)
    if begun.is_file():
        if read_json(begun, {}, f"remove {out} or take another folder") != about:
            raise UserError(f"{out} holds a part of other images, which {begun} describes; remove it or take another folder")
    elif any(out.iterdir()):
        raise UserError(f"{out} is not empty, and images of two sets must not mix; take another folder")
    replace_file(begun, sealed(about))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m eae_dist.generate", description=__doc__.split(":\n")[0])
    parser.add_argument("--ckpt", type=Path, required=True, help="a checkpoint folder, or a run folder (its latest checkpoint)")
    parser.add_argument("--density", default="isotropic", help="isotropic, mvg, gmm, two_stage or flow; default: isotropic")
    parser.add_argument("--count", type=int, default=100, help="how many images; default: 100")
    parser.add_argument("--nproc", type=int, help="local ranks; default: one per GPU, or one on a CPU")
    parser.add_argument(
        "given", nargs="*", metavar="OUT|key=value", help="folder of the images; evaluate.seed and evaluate.batch"
    )
    arguments = parser.parse_intermixed_args(argv)
    settings = [text for text in arguments.given if is_assignment(text)]
    folders = [text for text in arguments.given if not is_assignment(text)]
    if len(folders) != 1:
        parser.error(f"expected one output folder OUT, got {' '.join(folders) or 'none'}")
    command = ["--ckpt", str(arguments.ckpt), "--density", arguments.density, "--count", str(arguments.count)]

    def work() -> str:
        generate(arguments.ckpt, Path(folders[0]), arguments.density, arguments.count, settings)
        return f"{arguments.count:,} draws from {arguments.density} in {folders[0]}"

    said = run_on_ranks("eae_dist.generate", arguments.nproc, [*command, *arguments.given], partial(how_to_judge, settings), work)
    if said is not None:
        print(said)


if __name__ == "__main__":
    main()
