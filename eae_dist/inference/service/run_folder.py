"""What a training run wrote beside its checkpoints: curves and grids of pictures. The run may still be training."""

import json
import re
from pathlib import Path

POINTS = 500  # the most points of a curve
GRID = re.compile(r"step-(\d{8,})-(samples|reconstructions|interpolations)\.png")


class RunFolder:
    """The run folder of a checkpoint; it is empty for a checkpoint that lies outside a run folder."""

    def __init__(self, checkpoint: Path):
        self._root = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None

    def curves(self) -> dict[str, list[tuple[int, float]]]:
        """Returns the values of each number in metrics.jsonl by images seen.

        They are thinned evenly to POINTS; the last one stays.
        """
        curves: dict[str, list[tuple[int, float]]] = {}
        path = self._root and self._root / "metrics.jsonl"
        for line in path.read_text(errors="replace").splitlines() if path and path.is_file() else []:
            try:
                record = json.loads(line)
                images = int(record["images"])
            except (ValueError, KeyError, TypeError):  # a line that is being written, or was cut short
                continue
            for name, value in record.items():
                if isinstance(value, int | float) and name not in ("step", "epoch", "images"):
                    curves.setdefault(name, []).append((images, value))
        return {name: thinned(points) for name, points in curves.items()}

    def grids(self) -> dict[str, dict[int, Path]]:
        """Returns the pictures in samples/ by kind and step, in the order of the steps."""
        found: dict[str, dict[int, Path]] = {}
        for path in sorted((self._root / "samples").glob("step-*.png")) if self._root else []:
            if match := GRID.fullmatch(path.name):
                found.setdefault(match[2], {})[int(match[1])] = path
        return found


def thinned(points: list) -> list:
    """Returns at most POINTS of the points, evenly spaced, with the last one."""
    stride = -(-len(points) // POINTS)
    return points[(len(points) - 1) % stride :: stride] if points else points
