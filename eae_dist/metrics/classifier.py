"""The small classifier whose last hidden layer the `mnistcnn` and `fashioncnn` features are, and how it is trained:

    python -m eae_dist.metrics.classifier SHARDS OUT.safetensors [--epochs 10] [--seed 0]

It sees the train split of SHARDS alone; its accuracy on the other splits, measured with the weights as they are written
(float16), stands in the file's metadata with the command. The weights in metrics/weights/ were made by it; another number of
threads or version of torch gives others, so they are kept rather than trained where they are needed.
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn
from tqdm import trange

from eae_dist.data.shards import ShardIndex
from eae_dist.data.stream import ShardStream, walk
from eae_dist.durable import replace_file, sha256_of

SIDE = 32  # pixels: height and width of the images that it sees
HIDDEN = 64
BATCH = 100


class Classifier(nn.Module):
    """Three convolutions and a hidden layer of 64; 69,000 parameters for ten classes."""

    def __init__(self, classes: int):
        super().__init__()
        self.hidden = nn.Sequential(
            *_convolution(1, 16),
            *_convolution(16, 32),
            *_convolution(32, 48),
            nn.Flatten(),
            nn.Linear(48 * 4 * 4, HIDDEN),
            nn.ReLU(),
        )
        self.classes = nn.Linear(HIDDEN, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of gray images in [0, 1], [b, 1, 32, 32] -> [b, classes]; `hidden` alone gives the features, [b, 64]."""
        return self.classes(self.hidden(images))


def _convolution(channels_in: int, channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(), nn.MaxPool2d(2)]


def load_classifier(path: Path) -> Classifier:
    """The classifier that `train_classifier` wrote, in evaluation mode, in float32."""
    weights = load_file(path)
    classifier = Classifier(len(weights["classes.bias"]))
    classifier.load_state_dict(weights)  # copies float16 into float32
    return classifier.eval().requires_grad_(False)


def record_of(path: Path) -> dict[str, str]:
    """How a file of weights was made: command, data, accuracy."""
    with safe_open(path, "pt") as file:
        return file.metadata()


def train_classifier(shards: Path, out: Path, *, epochs: int, seed: int) -> dict[str, str]:
    """Trains on the train split, writes the weights in float16 to `out`; returns the record that stands in its metadata.

    Raises ValueError for images that are not gray 32x32 and for data without labels.
    """
    index = ShardIndex.load(shards)
    if index.image_shape != (1, SIDE, SIDE) or len(index.classes) < 2:
        raise ValueError(
            f"{shards} holds images of shape {index.image_shape} (c, h, w) of {len(index.classes)} classes; the classifier wants "
            f"labeled images of shape {(1, SIDE, SIDE)}"
        )
    torch.manual_seed(seed)
    classifier = Classifier(len(index.classes))
    stream = ShardStream(shards, "train", BATCH, seed=seed)
    steps = epochs * stream.samples // BATCH
    optimizer = torch.optim.Adam(classifier.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps)
    batches = iter(stream)
    for _ in trange(steps, desc="training", unit=" steps"):
        batch = next(batches)
        loss = nn.functional.cross_entropy(classifier(batch["image"].float() / 255), batch["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    batches.close()

    weights = {key: x.half() if x.is_floating_point() else x for key, x in classifier.state_dict().items()}
    classifier.load_state_dict(weights)
    record = {
        "command": f"python -m eae_dist.metrics.classifier {shards} {out} --epochs {epochs} --seed {seed}",
        "data": index.name,
        "index_sha256": index.sha256,
        "license": index.info["license"],
        "train_images": str(stream.samples),
        "epochs": str(epochs),
        "seed": str(seed),
        "torch": torch.__version__,
    }
    for split in ("validation", "test"):
        if split in index.info["splits"] and index.split(split).samples:
            record[f"{split}_accuracy"] = f"{accuracy(classifier, shards, split):.4f}"
    replace_file(out, save(weights, metadata=record))
    return record


@torch.no_grad()
def accuracy(classifier: Classifier, shards: Path, split: str) -> float:
    """The share of a split's images whose class is named."""
    classifier.eval()
    right = [
        classifier(batch["image"].float() / 255).argmax(1) == batch["label"]
        for batch in walk(shards, split, 500, rank=0, world=1)
    ]
    return torch.cat(right).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", type=Path, help="folder of packed gray 32x32 images with labels")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # several threads add in another order
    record = train_classifier(arguments.shards, arguments.out, epochs=arguments.epochs, seed=arguments.seed)
    print(json.dumps(record | {"sha256": sha256_of(arguments.out)}, indent=2))


if __name__ == "__main__":
    main()
