"""A checkpoint after the training: its model, the settings that may change, its data, and the folder of its evaluation."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from eae_dist.config import HOW_TO_START, WHERE_DATA_LIES, Config, changed_keys, override
from eae_dist.data.remote import Cache
from eae_dist.data.shard_index import ShardIndex
from eae_dist.errors import UserError
from eae_dist.objectives import Objective, build_objective
from eae_dist.training.checkpoint import Checkpoint, split_averages


def load_objective(checkpoint: Checkpoint, allow: Collection[str] = ()) -> Objective:
    """Returns the trained objective on the CPU, in eval mode, with the averages of its weights if there are any.

    A checkpoint may have an untrusted origin, so a network class that it names (model.encoder, model.decoder) is imported only
    if it is in `allow`. Raises ValueError otherwise.
    """
    config = checkpoint.config
    for key, name in (("model.encoder", config.model.encoder), ("model.decoder", config.model.decoder)):
        if name is not None and name not in allow:
            raise UserError(
                f"{checkpoint.path} was trained with {key}={name}, code that is not part of eae_dist; "
                f"name it to allow its import: {key}={name} on the command line, or load(..., allow=[{name!r}])"
            )
    objective = build_objective(config.model, config.objective, checkpoint.state["image_shape"], config.train.seed)
    weights, averages = split_averages(checkpoint.model_state())
    objective.load_state_dict(weights | averages)
    return objective.eval()


def named_networks(assignments: Sequence[str]) -> list[str]:
    """Returns the network classes that a command line names and so allows."""
    return [text.split("=", 1)[1] for text in assignments if text.startswith(("model.encoder=", "model.decoder="))]


def evaluation_config(checkpoint: Checkpoint, assignments: Sequence[str]) -> Config:
    """Returns the checkpoint's configuration with changed evaluate.*, index.*, location of the data and way to start.

    Raises ValueError for a change of any other setting.
    """
    config = override(checkpoint.config, assignments)
    data = replace(checkpoint.config.data, **{key: getattr(config.data, key) for key in WHERE_DATA_LIES})
    train = replace(checkpoint.config.train, **{key: getattr(config.train, key) for key in HOW_TO_START})
    judged = replace(checkpoint.config, evaluate=config.evaluate, index=config.index, data=data, train=train)
    changed = changed_keys(judged, config, changeable=False) + changed_keys(judged, config, changeable=True)
    if changed:
        others = [*(f"data.{key}" for key in WHERE_DATA_LIES[1:]), *(f"train.{key}" for key in HOW_TO_START)]
        raise UserError(
            f"only evaluate.*, index.* and data.root can be set for the checkpoint {checkpoint.path}, and {', '.join(others)}; "
            f"the checkpoint fixes all other settings:\n  " + "\n  ".join(changed)
        )
    return config


def open_data(checkpoint: Checkpoint, config: Config) -> ShardIndex:
    """Opens the index of data.root. Raises ValueError for images of another shape than those of the model."""
    index = ShardIndex.load(config.data.root, Cache.of(config.data))
    if index.image_shape != tuple(checkpoint.state["image_shape"]):
        raise UserError(
            f"data.root={config.data.root} holds images of shape {index.image_shape} (c, h, w), but the checkpoint was trained "
            f"on {tuple(checkpoint.state['image_shape'])}"
        )
    return index


def evaluation_folder(checkpoint: Checkpoint) -> Path:
    """Returns RUN/evaluation for a checkpoint in RUN/checkpoints, else the folder evaluation beside the checkpoint."""
    folder = checkpoint.path.parent
    return (folder.parent if folder.name == "checkpoints" else folder) / "evaluation"
