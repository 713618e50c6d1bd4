"""Downloading of data sets by torchvision."""

from pathlib import Path
from typing import Any

from eae_dist.errors import UserError


def downloaded(dataset: type, root: Path, put: str, **arguments: Any) -> Any:
    """Returns a data set of torchvision, downloaded unless it is in `root`.

    put: tells the user which files to put where instead. Raises ValueError if the download fails.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        return dataset(str(root), download=True, **arguments)
    except Exception as error:  # a download raises many types: URLError, RuntimeError, errors of gdown
        why = " ".join(str(error).split())
        raise UserError(f"{dataset.__name__} could not be read or downloaded ({why}); put {put}, or give --root") from error
