"""Packs images into shards, the format that all other commands read; the README in shards/ explains it.

    python -m eae_dist.pack mnist5k shards/mnist5k                      a data set, of those that --help lists
    python -m eae_dist.pack imagefolder photos/ shards/photos --size 64
    python -m eae_dist.pack npz images.npz shards/images
    python -m eae_dist.pack webdataset 'tars/{000..099}.tar' shards/photos --size 64 --split-fractions 0.9,0.05,0.05
    python -m eae_dist.pack --index DIR                                 an index for existing tar shards
    python -m eae_dist.pack --index s3://BUCKET/FOLDER --out DIR        an index for shards that stay on a server
    python -m eae_dist.pack --verify DIR                                check every file against the index, decode every image

Samples are written in random order, not by class, because training reads one shard for many steps. DIR appears only when it
is complete.
"""

import argparse
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from eae_dist.config import WHERE_DATA_LIES, load_config
from eae_dist.data.encoding import EXTENSIONS, JPEG_QUALITY, Encoding
from eae_dist.data.indexing import DECODED, build_index, build_remote_index
from eae_dist.data.packing import free_folder, pack
from eae_dist.data.pixels import Fit, Rules
from eae_dist.data.remote import Cache
from eae_dist.data.servers import is_address
from eae_dist.data.sources import CACHE, SOURCES, SPLITS, Source
from eae_dist.data.split_names import split_called
from eae_dist.data.verifying import verify
from eae_dist.distributed.processes import available_cores
from eae_dist.errors import UserError, is_users

CHANNELS = {"type": int, "choices": (1, 3), "help": "1 gray, 3 RGB (default: 1 if every image is gray)"}
FRAMES = {"choices": ("first",), "help": "take the first of several frames (default: such files are refused)"}
FRACTIONS = "fractions of train, validation and test, drawn by class (default: as the files are named, else 0.8,0.1,0.1)"
FIT = {  # options of every source, in the order in which they are applied
    "--crop": "take the center NxN pixels",
    "--pad": "add black on all sides, up to NxN pixels",
    "--size": "resize the central square to NxN (bilinear)",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command. Returns the exit code: 0, 1 for damage found by --verify, 2 for an error, 130 for Ctrl-C."""
    arguments = parsed(argv)
    try:
        if arguments.verify:
            return print_damage(arguments.verify, verify(arguments.verify, arguments.workers, cache_of(arguments.set)))
        if arguments.index:
            how = (arguments.split, arguments.workers, rules_of(arguments), sys.maxsize if arguments.decode else DECODED)
            if arguments.out:
                folder = free_folder(arguments.out)
                info, notes = build_remote_index(arguments.index, folder, cache_of(arguments.set), *how)
            else:
                folder = arguments.index
                info, notes = build_index(folder, *how)
            print_summary("indexed", folder, info, notes)
            return 0
        folder = free_folder(arguments.folder)
        encoding = Encoding(arguments.format, arguments.quality)
        source = loaded(arguments, folder, encoding)
        info = pack(source, folder, encoding, arguments.shard_size, arguments.seed, arguments.workers)
        source.finish()
        print_summary("packed", folder, info, source.notes)
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if not is_users(error):
            raise
        print("error:", str(error).replace("\n", " "), file=sys.stderr)
        return 2


def rules_of(arguments: argparse.Namespace) -> Rules:
    """Returns how images are read; a source without an option has its default."""
    channels, scale, frames = (getattr(arguments, name, None) for name in ("channels", "scale", "frames"))
    return Rules(channels, scale, frames)


def loaded(arguments: argparse.Namespace, folder: Path, encoding: Encoding) -> Source:
    """Returns the source that the command line names, with its images fitted."""
    load = SOURCES[arguments.source]
    parameters = inspect.signature(load).parameters
    fit = Fit(arguments.crop, arguments.pad, arguments.size)
    known = vars(arguments) | {"fit": fit, "rules": rules_of(arguments), "encoding": encoding}
    known["parts"] = folder.with_name(folder.name + ".parts")
    if "cache" in parameters:
        known["cache"] = cache_of(arguments.set)
    source = load(**{name: known[name] for name in parameters})
    return source if "fit" in parameters else source.fitted(fit)


def cache_of(settings: list[str]) -> Cache:
    """Returns the cache of remote shards for key=value settings. Raises ValueError for settings that are not about the cache."""
    known = [f"data.{name}" for name in WHERE_DATA_LIES if name != "root"]
    for setting in settings:
        if setting.partition("=")[0] not in known:
            raise UserError(f"--set {setting} is not about fetching shards; it takes {', '.join(known)}")
    return Cache.of(load_config(settings).data)


def print_summary(verb: str, folder: Path, info: dict, notes: Iterable[str]) -> None:
    """Prints the sizes of a data set and the notes."""
    shape = "x".join(map(str, info["image"]["shape"]))
    print(f"{verb} {info['name']} in {folder}: images {shape} (channels x height x width), {info['image']['encoding']}")
    for split, totals in info["splits"].items():
        samples, shards, megabytes = totals["samples"], totals["shards"], totals["bytes"] / 1e6
        print(f"  {split:<12}{samples:>12,} samples {shards:>8,} shards {megabytes:>12,.1f} MB")
    for note in (f"preprocessing: {info['preprocessing']}", *notes):
        print(f"  {note}")


def print_damage(folder: Path | str, problems: list[str]) -> int:
    """Prints the result of --verify and returns the exit code, 1 for damage."""
    for problem in problems:
        print(problem)
    print(f"{folder}: {len(problems)} damaged" if problems else f"{folder}: every file is as the index says")
    return 1 if problems else 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see --help)\n")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line; an error ends the process with exit code 2."""
    of_source: dict[str, dict[str, dict[str, Any]]] = {  # command-line options for the parameters of the functions in SOURCES
        "path": {"path": {"type": Path, "help": "the folder of images or of parquet files, or the .npz file"}},
        "tars": {"tars": {"nargs": "+", "metavar": "TARS", "help": "paths or addresses, with braces or *"}},
        "root": {"--root": {"type": Path, "help": f"folder of the raw data; missing files are downloaded (default: {CACHE})"}},
        "rules": {"--channels": CHANNELS, "--scale": SCALE, "--frames": FRAMES},
        "scale": {"--scale": SCALE},
        "layout": {"--layout": {"choices": ("nhwc", "nchw"), "help": "order of an image's array (default: nhwc, or [n, h, w])"}},
        "classes": {
            "--classes": {"action": "store_true", "help": "every folder is a class, also one that is called as a split is"}
        },
        "splits": {"--splits": {"type": _splits, "metavar": "train=FOLDER,...", "help": "the folder of each split"}},
        "skip_bad": {"--skip-bad": {"action": "store_true", "help": "leave out what is not a usable image"}},
        "label_key": {"--label-key": {"type": _label_key, "help": "where labels are: cls (default), txt, json:FIELD"}},
        "image_key": {
            "--image-key": {"metavar": "EXTENSION", "help": "which member of a sample is the image (default: the only one)"}
        },
        "dots_in_keys": {"--dots-in-keys": {"action": "store_true", "help": "a key ends at the last dot, not at the first"}},
        "image_column": {
            "--image-column": {"metavar": "NAME", "help": "the column of images (default: the only one that can be)"}
        },
        "label_column": {"--label-column": {"metavar": "NAME", "help": "the column of labels (default: label)"}},
        "split_fractions": {"--split-fractions": {"type": _fractions, "metavar": "A,B,C", "help": FRACTIONS}},
        "cache": {"--set": {"action": "append", "default": argparse.SUPPRESS, "metavar": "data.KEY=VALUE", "help": "as above"}},
    }
    workers: dict[str, Any] = {"type": _at_least(1), "metavar": "N", "help": "number of processes (default: one per core)"}
    formats = "format of the images in the shards (default: png)"
    quality = f"quality of jpeg (default: {JPEG_QUALITY})"

    parser = _Parser(prog="python -m eae_dist.pack", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    where: dict[str, Any] = {"type": lambda text: text if is_address(text) else Path(text), "metavar": "DIR"}
    parser.add_argument("--index", **where, help="write the index of the tar shards in DIR, or at an address with --out")
    parser.add_argument("--out", type=Path, metavar="DIR", help="with --index ADDRESS: folder for the index")
    parser.add_argument("--split", metavar="NAME", help="with --index: the split of all shards (default: from their names)")
    parser.add_argument("--verify", **where, help="check every file of a data set; exit code 1 for damage")
    fetching = "with --index ADDRESS, --verify or webdataset: a training setting for fetching shards; may be repeated"
    parser.add_argument("--set", action="append", default=[], metavar="data.KEY=VALUE", help=fetching)
    for flag, options in (("--channels", CHANNELS), ("--scale", SCALE), ("--frames", FRAMES)):
        parser.add_argument(flag, **options | {"help": f"with --index: {options['help']}"})
    decode = f"with --index: decode all images as training does (default: the first {DECODED} of each shard)"
    parser.add_argument("--decode", action="store_true", help=decode)
    parser.add_argument("--workers", default=available_cores(), **workers)
    sources = parser.add_subparsers(dest="source", metavar="SOURCE", title="sources (see SOURCE --help)")
    for name, load in SOURCES.items():
        source = sources.add_parser(name, help=load.__doc__, description=load.__doc__)
        for parameter in inspect.signature(load).parameters:
            for flag, options in of_source.get(parameter, {}).items():
                source.add_argument(flag, **options)
        source.add_argument("folder", type=Path, metavar="DIR", help="folder for the shards; it must be empty or new")
        for flag, what in FIT.items():
            source.add_argument(flag, type=_at_least(1), metavar="N", help=what)
        source.add_argument("--format", choices=EXTENSIONS, default="png", help=formats)
        source.add_argument("--quality", type=int, choices=range(1, 101), metavar="1..100", help=quality)
        source.add_argument(
            "--shard-size", type=_at_least(1), default=1000, metavar="N", help="samples per shard (default: 1000)"
        )
        source.add_argument("--seed", type=_at_least(0), default=0, help="seed of the order of the samples (default: 0)")
        source.add_argument("--workers", default=argparse.SUPPRESS, **workers)

    arguments = parser.parse_args(_joined(sys.argv[1:] if argv is None else argv))
    if [arguments.source, arguments.index, arguments.verify].count(None) != 2:
        parser.error(f"give one source ({', '.join(SOURCES)}), or --index DIR, or --verify DIR")
    if arguments.split and not arguments.index:
        parser.error("--split needs --index")
    if (arguments.out is not None) != isinstance(arguments.index, str):
        parser.error("--out DIR is needed with --index ADDRESS and only there: the index is not written to an address")
    if arguments.set and not (arguments.out or arguments.verify or arguments.source == "webdataset"):
        parser.error("--set needs --index ADDRESS, --verify or webdataset: other commands fetch no shards")
    if arguments.decode and not arguments.index:
        parser.error("--decode needs --index; --verify decodes all images")
    return arguments


def _joined(argv: list[str]) -> list[str]:
    """Joins --scale and its value, because argparse takes -1:1 for an option."""
    at = [i for i, word in enumerate(argv[:-1]) if word == "--scale"]
    words = [f"--scale={argv[i + 1]}" if i in at else word for i, word in enumerate(argv)]
    return [word for i, word in enumerate(words) if i - 1 not in at]


def _scale(text: str) -> tuple[float, float]:
    try:
        low, high = map(float, text.split(":"))
        if low < high and all(map(math.isfinite, (low, high))):
            return low, high
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected LOW:HIGH, the values that become 0 and 255, as 0:65535, got {text!r}")


SCALE = {"type": _scale, "metavar": "LOW:HIGH", "help": "values of more than 8 bits that become 0 and 255 (default: refused)"}


def _fractions(text: str) -> tuple[float, float, float]:
    try:
        train, validation, test = map(float, text.split(","))
        if min(train, validation, test) > 0 and abs(train + validation + test - 1) < 1e-6:
            return train, validation, test
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected three positive fractions that sum to 1, as 0.9,0.05,0.05, got {text!r}")


def _splits(text: str) -> dict[str, str]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    named = {split_called(name) or name: folder.rstrip("/") for name, _, folder in pairs}
    if len(named) < len(pairs) or "train" not in named or not all(named.values()) or not named.keys() <= set(SPLITS):
        raise argparse.ArgumentTypeError(f"expected train=FOLDER and perhaps validation=FOLDER,test=FOLDER, got {text!r}")
    return named


def _label_key(text: str) -> str:
    if not re.fullmatch(r"cls|txt|json:.+", text):
        raise argparse.ArgumentTypeError(f"expected cls, txt or json:FIELD, got {text!r}")
    return text


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not minimum <= int(text) < 2**63:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, got {text!r}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
