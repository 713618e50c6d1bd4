"""CelebA, as its authors, torchvision or Kaggle lay it out. Only the images and the list of splits are needed."""

import re
import zipfile
from pathlib import Path

import numpy as np

from eae_dist.data.image_files import ENDINGS, ImageFiles, checked, how_read, left_out
from eae_dist.data.pixels import Fit, Rules
from eae_dist.data.sources.downloads import downloaded
from eae_dist.data.sources.samples import CACHE, Samples, Source
from eae_dist.data.split_names import SPLITS
from eae_dist.errors import UserError

BASES = ("celeba", ".", "CelebA")  # torchvision's folder, Kaggle's, the authors'
LISTS = ("list_eval_partition.txt", "list_eval_partition.csv", "Eval/list_eval_partition.txt")
FACES = ("img_align_celeba/img_align_celeba", "img_align_celeba", "Img/img_align_celeba")
ZIPS = ("img_align_celeba.zip", "Img/img_align_celeba.zip")


def celeba(root: Path | None, skip_bad: bool, workers: int, fit: Fit) -> Source:
    """CelebA, 202,599 faces, center crop 140 resized to 64x64: torchvision's download, or img_align_celeba in --root."""
    root = root or CACHE
    partition, folder = files_in(root)
    if not (partition and folder):
        from torchvision.datasets import CelebA

        found = f" beside {partition or folder}" if partition or folder else ""
        put = " and ".join(
            [
                *([] if partition else ["list_eval_partition.txt (or .csv)"]),
                *([] if folder else ["the folder img_align_celeba (or img_align_celeba.zip)"]),
            ]
        )
        downloaded(CelebA, root, f"{put} into {root / BASES[0]}{found}", split="all")
        partition, folder = files_in(root)
    assert partition and folder  # torchvision has put them there
    named = splits_listed(partition)
    fit = Fit(fit.crop or (None if fit.pad else 140), fit.pad, fit.size or 64)
    files = ImageFiles([str(folder / name) for name in named], Rules(channels=3), fit)
    bad = checked(files, workers).bad
    notes = left_out(bad, len(files), skip_bad)
    if others := sum(path.suffix.lower() in ENDINGS and path.name not in named for path in folder.iterdir()):
        notes += (f"{others:,} images in {folder} were left out, as {partition.name} does not name them",)
    splits = {}
    for number, split in enumerate(SPLITS):
        names = [name for name, theirs in named.items() if theirs == number and str(folder / name) not in bad]
        files = ImageFiles([str(folder / name) for name in names], Rules(channels=3), fit)
        splits[split] = Samples(files, np.full(len(names), -1), [Path(name).stem for name in names])
    return Source(
        name="celeba",
        splits=splits,
        classes=[],
        origin="CelebA, aligned and cropped images, https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        license="non-commercial research only, as agreed with MMLAB, The Chinese University of Hong Kong",
        preprocessing=f"{how_read(3, fit)}; official splits",
        notes=notes,
    )


def files_in(root: Path) -> tuple[Path | None, Path | None]:
    """Returns the list of splits and the folder of images in `root`, None for what is not there; a zip file is unpacked."""
    partition = next((path for base in BASES for name in LISTS if (path := root / base / name).is_file()), None)
    for base in BASES:
        for folder in (root / base / name for name in FACES):
            if folder.is_dir() and any(path.suffix.lower() in ENDINGS for path in folder.iterdir()):
                return partition, folder
    for archive in (root / base / name for base in BASES for name in ZIPS):
        if partition is not None and archive.is_file():
            try:
                with zipfile.ZipFile(archive) as file:
                    file.extractall(archive.parent)
            except (zipfile.BadZipFile, EOFError) as error:
                raise UserError(f"{archive} is damaged or truncated ({error}); fetch it again") from error
            return partition, archive.with_suffix("")
    return partition, None


def splits_listed(path: Path) -> dict[str, int]:
    """Returns the split of each image, 0 train, 1 validation or 2 test. Raises ValueError that names an unusable line.

    Lines are `000001.jpg 0`, or `000001.jpg,0` below a header.
    """
    named = {}
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        fields = re.split(r"[,\s]+", line.strip())
        if fields == ["image_id", "partition"] or fields == [""]:
            continue
        if len(fields) != 2 or fields[1] not in ("0", "1", "2") or "/" in fields[0]:
            raise UserError(f"{path}, line {number}: got {line[:60]!r}, expected an image and 0, 1 or 2, as in `000001.jpg 0`")
        named[fields[0]] = int(fields[1])
    if not named:
        raise UserError(f"{path} names no image; fetch it again")
    return named
