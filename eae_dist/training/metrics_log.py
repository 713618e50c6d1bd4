"""metrics.jsonl: one line with a JSON object per logged step. The trackers of accelerate get the same numbers."""

import json
import logging
import math
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator

from eae_dist.distributed import gather_rows
from eae_dist.distributed.failures import first_line
from eae_dist.errors import UserError
from eae_dist.model.autoencoder import to_uint8
from eae_dist.numerics.atomic_files import naming, replace_file
from eae_dist.numerics.json_files import read_json, sealed

log = logging.getLogger("eae_dist")

Record = dict[str, float | list[float]]  # one line of the log; a list has one number per rank
MLFLOW_FILE = "/eae_dist.db"  # of mlflow in a run folder
FINITE_NORMS = "finite_norms"  # logged with the terms: number of batch norms with finite input on a rank


class TrainingDiverged(RuntimeError):
    """A loss or gradient is not a finite number."""


class MetricsLog:
    """Appends records; in a continued run, lines after `step` are removed first, so that no step occurs twice.

    Create it on every rank; only rank 0 writes and starts the trackers.
    """

    def __init__(self, run: Path, accelerator: Accelerator, step: int, settings: dict):
        self.path, self.trackers, self.accelerator = run / "metrics.jsonl", run / "trackers", accelerator
        if accelerator.is_main_process:
            replace_file(self.path, "".join(f"{line}\n" for line in lines_up_to(self.path, step)))
        with naming(self.trackers):
            self._start_trackers(run, step, settings)

    def _start_trackers(self, run: Path, step: int, settings: dict) -> None:
        """Starts the trackers; in a continued run, those of services continue their run, whose ids lie in the run folder.

        Raises UserError if one does not start.
        """
        main, names = self.accelerator.is_main_process, {str(tracker) for tracker in self.accelerator.log_with}
        ids = self.trackers / "ids.json"
        known = read_json(ids, {}, "remove it to start new runs of the trackers") if ids.is_file() else {}
        if "wandb" in names and "wandb" not in known and main:
            known["wandb"] = secrets.token_hex(8)
            self._keep(known)  # before it starts, as a start that fails after it would leave a run behind
        options: dict[str, dict] = {
            "tensorboard": {"purge_step": step + 1},  # hides what an interrupted run wrote after the checkpoint
            "wandb": {"dir": str(run), "id": known.get("wandb"), "resume": "allow", "name": run.resolve().name},
            "mlflow": {"run_id": known.get("mlflow"), "run_name": run.resolve().name},
        }
        if "mlflow" in names and main:
            options["mlflow"] |= mlflow_kept_in(self.trackers.resolve() / "mlflow")
        try:
            self.accelerator.init_trackers(project_name(run), init_kwargs=options)
        except OSError:  # `naming` says where
            raise
        except Exception as error:  # every tracker has errors of its own
            why = f"{type(error).__module__.partition('.')[0]}: {first_line(error)}"
            raise UserError(
                f"train.trackers={sorted(names)}: one did not start ({why}); set it right, or leave it out"
            ) from error
        for tracker in self.accelerator.trackers:
            # TensorBoard would show settings as a second run, and mlflow refuses another value of one in a continued run.
            if tracker.name != "tensorboard" and not (tracker.name == "mlflow" and "mlflow" in known):
                tracker.store_init_configuration({key: str(value) for key, value in settings.items()})
            if tracker.name == "mlflow" and main:
                self._keep(known | {"mlflow": tracker.tracker.info.run_id})

    def _keep(self, ids: dict[str, str]) -> None:
        """Writes the ids of the trackers' runs into the run folder."""
        self.trackers.mkdir(exist_ok=True)
        replace_file(self.trackers / "ids.json", sealed(ids))

    def write(self, record: Record) -> None:
        """Appends one record with "step", "images" and finite floats. Raises OSError on rank 0 if writing fails."""
        if self.accelerator.is_main_process:
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        lists = {key: value for key, value in record.items() if isinstance(value, list)}
        scalars = {key: value for key, value in record.items() if key not in lists and key != "step"}
        scalars |= {f"{key}/rank-{who}": value for key, values in lists.items() for who, value in enumerate(values)}
        with naming(self.trackers):
            self.accelerator.log(scalars, step=record["step"])

    def show(self, grids: dict[str, torch.Tensor], files: dict[str, Path], step: int) -> None:
        """Sends pictures, float [3, H, W] in [0, 1], to the trackers that take any. files: the same as PNG files."""
        pictures = {name: to_uint8(grid).permute(1, 2, 0)[None].cpu().numpy() for name, grid in grids.items()}
        with naming(self.trackers):
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    tracker.log_images(pictures, step=step, dataformats="NHWC")
                elif tracker.name == "wandb":
                    tracker.log_images(pictures, step=step)
                elif tracker.name == "mlflow":
                    for file in files.values():
                        tracker.log_artifact(str(file), artifact_path="samples")

    def finish(self) -> None:
        """Closes the trackers. Raises OSError if they could not be written."""
        with naming(self.trackers):
            for tracker in self.accelerator.trackers:
                tracker.finish()


def mlflow_kept_in(folder: Path) -> dict[str, str]:
    """Makes mlflow keep its runs in a folder, unless the user named a server or another place; returns options of its tracker.

    By itself mlflow writes into the folder in which a command starts, so a run that continues elsewhere would not be found.
    """
    import mlflow

    if mlflow.is_tracking_uri_set() and not mlflow.get_tracking_uri().endswith(MLFLOW_FILE):  # that of a run before this one
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    mlflow.set_tracking_uri(f"sqlite:///{folder}{MLFLOW_FILE}")
    return {"logging_dir": str(folder / "artifacts")}


def project_name(run: Path) -> str:
    """Returns the name under which trackers show a run: that of its folder, without the characters that services refuse.

    A run folder of an earlier version keeps the name that its curves have.
    """
    return "run" if (run / "trackers" / "run").is_dir() else re.sub(r"[/\\#?%:']", "-", run.resolve().name)[:128] or "run"


def lines_up_to(path: Path, step: int) -> list[str]:
    """Returns the complete lines of a metrics file whose step is at most `step`; an incomplete last line is dropped."""
    kept = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            log.warning("%s: left out a line that is not a record: %.80s", path, line)
    return kept


def averaged(
    window: list[torch.Tensor],
    names: list[str],
    step: int,
    last_checkpoint: Callable[[], Path | None],
    *,
    ignore_gradient: bool,
) -> dict[str, float]:
    """Returns means over ranks and over the steps of the window that ends with `step`.

    Raises TrainingDiverged if a value is not finite; it names the ranks with the fewest FINITE_NORMS, where the error started.
    """
    shares = gather_rows(torch.stack(window)[None]).cpu()  # [W, steps, terms]
    if ignore_gradient:  # the loss scaling of fp16 skips steps whose gradient overflows
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
    means = dict(zip(names, shares.mean(0).mean(0).tolist(), strict=True))
    del means[FINITE_NORMS]
    return means


def require_finite(
    terms: dict[str, float], step: int, last_checkpoint: Callable[[], Path | None], ranks: Sequence[int] = ()
) -> None:
    """Raises TrainingDiverged if a term is not finite; it names the term, the step, the ranks and the last checkpoint."""
    if bad := [name for name, value in terms.items() if not math.isfinite(value)]:
        name, last = first_cause(bad), last_checkpoint()
        good = "no checkpoint was saved before" if last is None else f"the last good checkpoint is {last}"
        where = f" on rank {', '.join(map(str, ranks))}" if ranks else ""
        raise TrainingDiverged(
            f"{name} is {terms[name]} at step {step}{where}; {good}. Lower train.learning_rate or set train.clip_norm"
        )


def first_cause(names: Sequence[str]) -> str:
    """Returns the term that explains the others: the loss is a sum of terms, and the gradient follows from the loss."""
    return min(names, key=lambda name: (name == "gradient_norm", name.endswith("loss")))
