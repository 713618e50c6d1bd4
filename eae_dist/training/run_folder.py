"""The folder of a run: one job at a time has it, and continues only what was trained with the same settings and data."""

import fcntl
import logging
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import IO

from eae_dist.config import Config, changed_keys
from eae_dist.distributed import from_rank_zero, on_rank_zero
from eae_dist.errors import UserError, UserFileError
from eae_dist.numerics.atomic_files import naming
from eae_dist.training.checkpoint import Checkpoint, mark_best, newest_intact, set_aside_newer

log = logging.getLogger("eae_dist")


def lock(folder: Path, setting: str = "train.output") -> IO | None:
    """Creates the folder and locks it against other jobs until the returned file is closed or the process ends.

    Call on every rank; rank 0 holds the lock. setting: what names the folder. Raises OSError if the folder cannot be written or
    is in use.
    """
    held = None
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held = open(folder / ".lock", "a+")  # noqa: SIM115  it is open for as long as the lock is held
            except OSError as error:
                raise UserFileError(f"{setting}={folder} cannot be written: {error}") from error
            try:
                fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                held.seek(0)
                holder = f"another job ({held.read()})"
                raise UserFileError(f"{setting}={folder} is in use by {holder}; wait for it or choose another folder") from error
            except OSError as error:  # some network file systems have no locks
                log.warning("%s=%s cannot be locked (%s); keep other jobs out of it", setting, folder, error)
            else:
                with naming(folder / ".lock"):
                    held.truncate(0)
                    held.write(f"process {os.getpid()} on {platform.node()}")
                    held.flush()
    return held


def open_run_folder(run: Path, config: Config, data_identity: dict) -> Checkpoint | None:
    """Creates or continues the run folder; returns the newest intact checkpoint on every rank, or None for a new run.

    Raises ValueError if the data or a setting that must not change has changed, and OSError if the folder cannot be written.
    """
    found = None
    with on_rank_zero() as is_rank_zero:
        if is_rank_zero:
            run.mkdir(parents=True, exist_ok=True)
            found, damage = newest_intact(run)
            for line in damage:
                log.warning("%s; going back to the checkpoint before it", line)
            if found is not None:  # without a checkpoint, settings may still change
                changed = changed_keys(found.config, config, changeable=False)
                if changed and found.state["stream"].get("index_sha256") != data_identity.get("index_sha256"):
                    changed.insert(0, f"data: {found.config.data.root} -> {config.data.root}")  # the cause of others
                if changed:
                    raise UserError(
                        f"train.output={run} holds a run with other settings; choose another folder or the old values:\n  "
                        + "\n  ".join(changed)
                    )
                for line in changed_keys(found.config, config, changeable=True):
                    log.info("changed since the last checkpoint: %s", line)
                check_same_data(found.state["stream"], data_identity, run)
                found = replace(found, path=set_aside_newer(run, found.path), of_rank_zero=True)
                mark_best(run, found.state["best_step"])
            elif damage:
                raise UserError(f"no checkpoint of {run} is intact; move the folder away to start a new run")
    return from_rank_zero(found)  # the other ranks do not read and verify all files once more


def check_same_data(before: dict, now: dict, run: Path) -> None:
    """Raises ValueError if this stream does not continue the batches of the run."""
    changed = [f"{key}: {before.get(key)} -> {value}" for key, value in now.items() if before.get(key) != value]
    if changed:
        raise UserError(
            f"{run} was trained on other data or in another order; restore data.root or choose another train.output:\n  "
            + "\n  ".join(changed)
        )
