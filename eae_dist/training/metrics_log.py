"""metrics.jsonl: one JSON object a line, one line a step that was logged; the same numbers go to accelerate's trackers."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from eae_dist.distributed import gather_rows
from eae_dist.numerics.atomic_files import replace_file

log = logging.getLogger("eae_dist")

FINITE_NORMS = "finite_norms"  # beside the terms: how many batch norms have seen finite rows of a rank


class TrainingDiverged(RuntimeError):
    """A loss or gradient that is not a finite number."""


class MetricsLog:
    """Appends records; on a continued run everything after `step` is cut away first, so that no step stands twice.

    Make it on every rank; only rank 0 writes, and starts the trackers.
    """

    def __init__(self, run: Path, accelerator: Accelerator, step: int, settings: dict):
        self.path, self.accelerator = run / "metrics.jsonl", accelerator
        if accelerator.is_main_process:
            replace_file(self.path, "".join(f"{line}\n" for line in lines_up_to(self.path, step)))
        # TensorBoard hides what an interrupted run wrote after the checkpoint.
        accelerator.init_trackers("run", init_kwargs={"tensorboard": {"purge_step": step + 1}})
        for tracker in accelerator.trackers:
            if tracker.name != "tensorboard":  # there, settings become a second run on the page
                tracker.store_init_configuration({key: str(value) for key, value in settings.items()})

    def write(self, record: dict[str, float]) -> None:
        """Appends one record with "step" and "images"; floats are finite. Raises OSError, on rank 0, if that fails."""
        if self.accelerator.is_main_process:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise OSError(f"{self.path} could not be written: {error.strerror or error}") from error
        lists = {key: value for key, value in record.items() if isinstance(value, list)}
        scalars = {key: value for key, value in record.items() if key not in lists and key != "step"}
        scalars |= {f"{key}/rank-{who}": value for key, values in lists.items() for who, value in enumerate(values)}
        self.accelerator.log(scalars, step=record["step"])


def lines_up_to(path: Path, step: int) -> list[str]:
    """The complete lines of a metrics file whose step is at most `step`; a last line that a kill cut short is dropped."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            log.warning("%s: left out a line that is no record: %.80s", path, line)
    return kept


def averaged(
    window: list[torch.Tensor],
    names: list[str],
    step: int,
    last_checkpoint: Callable[[], Path | None],
    *,
    ignore_gradient: bool,
) -> dict[str, float]:
    """Means over ranks and over the steps of the window that ends with `step`; raises TrainingDiverged if one is not finite.

    The ranks that it names are those with the fewest FINITE_NORMS, where it began.
    """
    shares = gather_rows(torch.stack(window)[None]).cpu()  # [W, steps, terms]
    if ignore_gradient:  # fp16's loss scaling skips steps whose gradient overflows
        shares[:, :, -1] = shares[:, :, -1].nan_to_num(posinf=0.0)
    bad = (~shares.isfinite()).nonzero()
    if len(bad):
        at = int(bad[:, 1].min())
        name = first_cause([names[term] for _, when, term in bad.tolist() if when == at])
        began = shares[:, at, names.index(FINITE_NORMS)]
        here = [who for who, when, term in bad.tolist() if when == at and names[term] == name]
        ranks = [who for who in here if began[who] == began[here].min()]
        value = float(shares[ranks[0], at, names.index(name)])
        require_finite({name: value}, step - len(window) + at + 1, last_checkpoint, ranks)
    means = dict(zip(names, shares.mean((0, 1)).tolist(), strict=True))
    del means[FINITE_NORMS]
    return means


def require_finite(
    terms: dict[str, float], step: int, last_checkpoint: Callable[[], Path | None], ranks: Sequence[int] = ()
) -> None:
    """Raises TrainingDiverged that names the term, the step, the ranks and the last good checkpoint."""
    if bad := [name for name, value in terms.items() if not math.isfinite(value)]:
        name, last = first_cause(bad), last_checkpoint()
        good = "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"
        where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
        raise TrainingDiverged(
            f"{name} is {terms[name]} at step {step}{where}; {good}. Lower train.learning_rate or set train.clip_norm"
        )


def first_cause(names: Sequence[str]) -> str:
    """The term that makes the others bad: the loss is the sum of terms, the gradient follows from the loss."""
    return min(names, key=lambda name: (name == "gradient_norm", name.endswith("loss")))
