"""What an evaluation that was interrupted left, so that the next one does not compute it again."""

import json
import logging
from pathlib import Path

from eae_dist.distributed import from_rank_zero, on_rank_zero
from eae_dist.numerics.atomic_files import replace_file
from eae_dist.numerics.json_files import read_json, sealed

log = logging.getLogger("eae_dist")


class EvaluationProgress:
    """The finished parts of an evaluation: evaluation/.progress.json, which counts only under the same key."""

    def __init__(self, folder: Path, key: dict):
        self.path, self.key, self.sets, self.densities = folder / ".progress.json", json.loads(json.dumps(key)), {}, {}
        with on_rank_zero() as is_rank_zero:
            if is_rank_zero:
                folder.mkdir(parents=True, exist_ok=True)
                found = self._read()
                if found and found["key"] != self.key:  # the densities of that evaluation will be overwritten
                    self.remove()
                elif found:
                    self.sets, self.densities = found["sets"], found["densities"]
                    log.info("continuing an evaluation that was interrupted: %s", ", ".join(self.sets) or "densities")
        self.sets, self.densities = from_rank_zero((self.sets, self.densities))

    def record(self, name: str, result: tuple[dict, list[str]]) -> None:
        """Stores the distances of a set of images."""
        self.sets[name] = result
        self._write()

    def record_density(self, name: str, report: dict) -> None:
        """Stores the report on a density."""
        self.densities[name] = report
        self._write()

    def remove(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)

    def remove_numbers_of_others(self) -> None:
        """Removes the metrics of another evaluation, whose densities will be overwritten."""
        numbers = self.path.with_name("metrics.json")
        try:
            if numbers.is_file() and not self.key.items() <= read_json(numbers, {}, "it is removed").items():
                numbers.unlink()
        except ValueError as error:
            log.warning("%s", error)
            numbers.unlink()

    def _read(self) -> dict:
        """Returns what an interrupted evaluation left; nothing if it cannot be read."""
        form = {"key": dict, "sets": dict, "densities": dict}
        try:
            return read_json(self.path, form, "its sets are judged again", is_sealed=True) if self.path.is_file() else {}
        except ValueError as error:
            log.warning("%s", error)
            return {}

    def _write(self) -> None:
        with on_rank_zero() as is_rank_zero:
            if is_rank_zero:
                replace_file(self.path, sealed({"key": self.key, "sets": self.sets, "densities": self.densities}))
