"""The commands under one name: `eae-dist train ...` is `python -m eae_dist.train ...`."""

import sys
from collections.abc import Sequence
from importlib import import_module

import eae_dist

COMMANDS = {
    "pack": "makes shards of images, or an index for shards that others made",
    "train": "trains one objective on one data set, on any number of ranks",
    "evaluate": "judges a checkpoint, or a folder of images",
    "table": "trains and judges all rows of the paper's table on one data set",
    "generate": "draws images from a trained model",
    "encode": "writes the latents of a whole data set",
    "neighbors": "finds neighbors, copies and memorized images among encoded latents",
    "serve": "serves a trained model over HTTP, with a page",
}


def help_text() -> str:
    """Returns the list of the commands."""
    lines = ["usage: eae-dist COMMAND ...   (the same as python -m eae_dist.COMMAND ...)", ""]
    lines += [f"  {name:10} {what}" for name, what in COMMANDS.items()]
    return "\n".join([*lines, "", "eae-dist COMMAND --help lists the options; launch several ranks with accelerate or torchrun."])


def main(argv: Sequence[str] | None = None) -> int | None:
    """Runs one command; returns its exit code."""
    name, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if name in ("-h", "--help"):
        print(help_text())
        return 0
    if name == "--version":
        print(eae_dist.__version__)
        return 0
    if name not in COMMANDS:
        sys.exit(f"error: {name} is no command; expected one of {', '.join(COMMANDS)}")
    return import_module(f"eae_dist.{name}").main(rest)


if __name__ == "__main__":
    sys.exit(main())
