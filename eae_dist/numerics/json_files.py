"""JSON files of this project: what is written with a checksum is read only as it was written, and the form of all is checked.

A JSON file that was cut short, edited or damaged on the disk is an error that names the file and says what to do.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from eae_dist.errors import UserError

CHECKSUM = "checksum"


def sealed(values: dict) -> str:
    """Returns the text of a JSON file with the values and, as the last one, the sha256 of the others."""
    return json.dumps({**values, CHECKSUM: _checksum(json.loads(json.dumps(values)))}, indent=2) + "\n"


def read_json(path: Path, wanted: Mapping[str, type], advice: str, *, is_sealed: bool = False) -> dict:
    """Returns the object in a JSON file, without its checksum.

    wanted: the keys that it must have, and the types of their values. is_sealed: whether it must have a checksum. Raises
    ValueError, which names the file and gives the advice, for a file that cannot be read or has another content.
    """
    try:
        values = json.loads(path.read_text())
        check_form(values, wanted)
        seal = values.pop(CHECKSUM, None)
        if seal is None and is_sealed:
            raise ValueError("it has no checksum")
        if seal is not None and seal != _checksum(values):
            raise ValueError("it does not match its checksum")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {advice}") from error
    return values


def check_form(values: object, wanted: Mapping[str, type]) -> None:
    """Raises ValueError unless the values are a mapping that has the wanted keys with values of these types."""
    if not isinstance(values, dict):
        raise ValueError(f"expected an object with {', '.join(wanted)}, got {json.dumps(values):.40}")
    for key, kind in wanted.items():
        if key not in values:
            raise ValueError(f"{key} is missing")
        number = isinstance(values[key], int | float) and not isinstance(values[key], bool)
        if not (number and isinstance(values[key], kind) if kind in (int, float) else isinstance(values[key], kind)):
            raise ValueError(f"{key} is {json.dumps(values[key]):.40}, expected {kind.__name__}")


def _checksum(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
