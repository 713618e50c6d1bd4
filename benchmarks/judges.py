"""Judges the judges: do distances of images grow with damage that a person sees, and with no other damage?

    python -m benchmarks.judges NAME=SHARDS:RUN ... [--features F ...] [--count N] --out FOLDER

F: a row of FEATURES or CANDIDATES, or your function package.module:function.

SHARDS: packed images with labels, splits train and test; RUN: a VAE trained on them. It writes FOLDER/NAME.csv (a value for every
network, measure, damage and level) and FOLDER/NAME.png (the first images of every damaged set), and prints the tables of
judges.md.

The reference is N images of the test split. Every judged set is N images of the train split (a seeded choice), damaged; level 0
is no damage. The reconstructions and draws are the VAE's. n: images of a set, c: channels, h and w: pixels.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.functional import gaussian_blur

import eae_dist
from eae_dist.data.order import permutation
from eae_dist.data.stream import walk
from eae_dist.inference.trained_model import TrainedModel, sample_seeds
from eae_dist.latent.gaussian import Gaussian
from eae_dist.metrics.efficientnet import lite0
from eae_dist.metrics.extractor import Extractor
from eae_dist.metrics.features import build_features
from eae_dist.metrics.image_sets import compare, describe
from eae_dist.model.autoencoder import to_uint8, to_unit
from eae_dist.numerics.keyed_random import derive_key
from eae_dist.report.grids import grid, png_bytes

BLOCK, SEED = 250, 0  # images per forward pass; the seed of every choice
MEASURES = {
    "frechet": 1,
    "kd": 1,
    "precision": -1,
    "recall": -1,
    "density": -1,
    "coverage": -1,
}  # 1: damage should raise it
CPU = torch.device("cpu")


# The damages: (images uint8 [n, c, h, w], level, generator) -> as many images.


def gain(images: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Multiplies the brightness by the level, clipped."""
    return (images.float() * level).clamp(0, 255).round().byte()


def dilation(images: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Sets every pixel to the brightest within 1 pixel (level 1) or 2 pixels (level 2).

    A level between 0 and 1 mixes the result with the original.
    """
    side = 2 * max(int(level), 1) + 1
    wide = F.max_pool2d(images.float(), side, stride=1, padding=side // 2)
    return torch.lerp(images.float(), wide, min(level, 1)).round().byte()


def blur(images: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Blurs with a Gaussian; level: its standard deviation in pixels."""
    return gaussian_blur(images.float(), [2 * int(3 * level) + 3] * 2, [level, level]).round().byte()


def noise(images: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Adds white Gaussian noise; level: its standard deviation, of 255."""
    return (images + level * torch.randn(images.shape, generator=generator)).clamp(0, 255).round().byte()


def faint(images: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    """Makes every pixel brighter by 0 to `level` of 255, at random, which no person sees."""
    return (images.int() + torch.randint(level + 1, images.shape, generator=generator)).clamp(max=255).byte()


def shift(images: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    """Shifts by `level` pixels up, down, left or right, at random, and fills with black."""
    padded = F.pad(images, [level] * 4)
    h, w = images.shape[2:]
    moves = torch.randint(4, (len(images),), generator=generator)
    corners = [(0, level), (2 * level, level), (level, 0), (level, 2 * level)]
    return torch.stack([padded[i, :, y : y + h, x : x + w] for i, (y, x) in enumerate(corners[m] for m in moves)])


def halves(images: torch.Tensor, level: float, generator: torch.Generator) -> torch.Tensor:
    """Replaces the right half of a share of the images by that of another image."""
    changed, middle = int(level * len(images)), images.shape[3] // 2
    joined = images.clone()
    joined[:changed, :, :, middle:] = images.roll(1, 0)[:changed, :, :, middle:]
    return joined


def patches(images: torch.Tensor, level: int, generator: torch.Generator) -> torch.Tensor:
    """Exchanges `level` pairs of patches in every image; a patch is a quarter of the image wide and high."""
    n, _, h, w = images.shape
    tiles = F.unfold(images.float(), (h // 4, w // 4), stride=(h // 4, w // 4))  # [n, values, 16]
    chosen = torch.stack([torch.randperm(16, generator=generator)[: 2 * level] for _ in range(n)])
    order = torch.arange(16).repeat(n, 1).scatter_(1, chosen, chosen.flip(1))
    moved = tiles.gather(2, order[:, None].expand_as(tiles))
    return F.fold(moved, (h, w), (h // 4, w // 4), stride=(h // 4, w // 4)).byte()


DAMAGES: dict[str, tuple[Callable, tuple[float, ...]]] = {
    "gain": (gain, (1.25, 1.5, 2)),
    "dilation": (dilation, (0.5, 1, 2)),
    "blur": (blur, (0.5, 1, 2)),
    "noise": (noise, (10, 20, 40)),
    "shift": (shift, (1, 2, 4)),
    "halves": (halves, (0.25, 0.5, 1)),
    "patches": (patches, (1, 2, 4)),
}
UNSEEN = (1, 2, 3)  # levels of `faint`, which should count less than any damage
CLASSES_LEFT_OUT, REPEATS = (1, 3, 6), (2, 5, 20)


def damaged(images: torch.Tensor, labels: torch.Tensor, count: int) -> Iterator[tuple[str, float, torch.Tensor]]:
    """Yields every damage and level with its images; the first is no damage."""
    chosen = images[:count]
    yield "none", 0, chosen
    for level in UNSEEN:
        yield "faint", level, faint(chosen, level, torch.Generator().manual_seed(SEED))
    for name, (damage, levels) in DAMAGES.items():
        for level in levels:
            yield name, level, damage(chosen, level, torch.Generator().manual_seed(SEED))
    for level in CLASSES_LEFT_OUT:
        left = images[labels >= level][:count]
        if len(left) < count:
            raise ValueError(f"without {level} classes there are {len(left)} images, not {count}; lower --count")
        yield "classes left out", level, left
    for level in REPEATS:
        yield "repeats", level, images[: -(-count // level)].repeat_interleave(level, 0)[:count]


@torch.no_grad()
def drawn(model: TrainedModel, images: torch.Tensor, count: int) -> Iterator[tuple[str, float, torch.Tensor]]:
    """Yields the reconstructions (level 0), and draws of two densities.

    They are the Gaussian of the latents at 1x, 1.5x and 2x of its standard deviation, and N(0, I).
    """
    latents = torch.cat([model.encode(to_unit(block, CPU)) for block in images.split(BLOCK)])
    gaussian = Gaussian()
    gaussian.fit(latents)

    def decoded(z: torch.Tensor) -> torch.Tensor:
        return torch.cat([to_uint8(model.decode(block.float())) for block in z.split(BLOCK)])

    yield "draws", 0, decoded(latents[:count])
    z = gaussian.sample(sample_seeds(SEED, np.arange(count)))
    for level in (1, 1.5, 2):
        yield "draws", level, decoded(gaussian.mean + level * (z - gaussian.mean))
    yield "N(0, I)", 1, torch.cat([to_uint8(model.sample(count))])


def random64() -> Extractor:
    """Returns EfficientNet-Lite0 at 64 px with random weights: He's for the kernels, zero biases, and no batch norms."""
    extractor = lite0(64, black=0, metric="fd_random64")
    torch.manual_seed(SEED)
    for layer in extractor.network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return extractor


CANDIDATES: dict[str, Callable[[], Extractor]] = {
    "lite0_64": lambda: lite0(64, black=0, metric="fd_lite0_64"),
    "lite0_224": lambda: lite0(224, black=0, metric="fd_lite0_224"),
    "random64": random64,  # the control
}


def values(
    images: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, model: TrainedModel, extractor: Extractor, count: int
) -> tuple[dict[tuple[str, float], dict[str, float]], float]:
    """Returns the measures of every damage and level, and images per second."""
    started, described = time.perf_counter(), {}

    def set_of(x: torch.Tensor):
        blocks = ((start, x[start : start + BLOCK]) for start in range(0, len(x), BLOCK))
        return describe(blocks, extractor, BLOCK, count, CPU, "the set")

    real = set_of(test[:count])
    for name, level, x in [*damaged(images, labels, count), *drawn(model, images, count)]:
        described[name, level] = set_of(x)
    speed = count * (len(described) + 1) / (time.perf_counter() - started)
    found = {}
    for key, one in described.items():
        numbers, _ = compare(real, one, extractor, "svd", CPU, "the set")
        names = {"frechet": extractor.metric, "kd": extractor.kernel_metric}
        found[key] = {measure: numbers[names.get(measure, measure)] for measure in MEASURES}
    return found, speed


def rises(steps: list[float]) -> bool:
    """Returns True if every step is larger than the one before."""
    return all(a < b for a, b in itertools.pairwise(steps))


def report(name: str, speeds: dict[str, float], every: dict[str, dict]) -> None:
    """Prints for every judge which damages it orders by level, and the distances of all sets."""
    damages = [*DAMAGES, "classes left out", "repeats"]
    print(f"\n## {name}\n\n| features | measure | {' | '.join(damages)} | unseen noise | reconstruction < 1x < 1.5x < 2x |")
    print("| --- " * (len(damages) + 4) + "|")
    for features, found in every.items():
        for measure, sign in MEASURES.items():
            steps = {
                damage: [sign * found["none", 0][measure], *(sign * x[measure] for (d, _), x in found.items() if d == damage)]
                for damage in (*damages, "faint")
            }
            # Noise that no person sees should count less than the highest level of any damage.
            verdicts = [rises(steps[damage]) for damage in damages]
            verdicts.append(steps["faint"][-1] < min(steps[damage][-1] for damage in damages))
            verdicts.append(rises([sign * x[measure] for (d, _), x in found.items() if d == "draws"]))
            cells = " | ".join("yes" if right else "**no**" for right in verdicts)
            print(f"| {features} | {measure} | {cells} |")
    sets = list(next(iter(every.values())))
    judges = [(features, measure) for features in every for measure in ("frechet", "kd")]
    print(f"\n| images | {' | '.join(f'{features} {measure}' for features, measure in judges)} |")
    print("| --- " * (len(judges) + 1) + "|")
    for damage, level in sets:
        cells = (f"{every[features][damage, level][measure]:.4g}" for features, measure in judges)
        print(f"| {damage} {level:g} | {' | '.join(cells)} |")
    print("\nImages a second: " + ", ".join(f"{features} {speed:.0f}" for features, speed in speeds.items()))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", metavar="NAME=SHARDS:RUN")
    parser.add_argument("--features", nargs="+", default=["efflite0_64px", "efflite0", *CANDIDATES])
    parser.add_argument("--count", type=int, default=500, help="images of a set")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for text in arguments.data:
        name, _, places = text.partition("=")
        shards, _, run = places.partition(":")
        count, model = arguments.count, eae_dist.load(run)
        blocks = list(walk(shards, "train", 1000))
        order = torch.from_numpy(permutation(sum(len(block["label"]) for block in blocks), derive_key(SEED))[: 10 * count])
        images, labels = (torch.cat([block[what] for block in blocks])[order] for what in ("image", "label"))
        test = next(walk(shards, "test", count))["image"]
        every, speeds = {}, {}
        shown = [x[:8] for _, _, x in [*damaged(images, labels, count), *drawn(model, images, count)]]
        picture = (255 * grid(torch.cat(shown).float() / 255, 8)).byte().permute(1, 2, 0).numpy()
        (arguments.out / f"{name}.png").write_bytes(png_bytes(Image.fromarray(picture)))
        for features in arguments.features:
            extractor = CANDIDATES[features]() if features in CANDIDATES else build_features(features)
            every[features], speeds[features] = values(images, labels, test, model, extractor, count)
        with open(arguments.out / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["features", "damage", "level", *MEASURES])
            for features, found in every.items():
                for (damage, level), numbers in found.items():
                    writer.writerow([features, damage, level, *(f"{numbers[m]:.6g}" for m in MEASURES)])
        report(name, speeds, every)


if __name__ == "__main__":
    main()
