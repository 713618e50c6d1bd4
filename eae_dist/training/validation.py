"""The loss on the validation split; it is the same on any number of ranks."""

import numpy as np
import torch
from accelerate import Accelerator

from eae_dist.config import Config
from eae_dist.data.order import blocks_of
from eae_dist.data.remote import Cache
from eae_dist.data.stream import walk
from eae_dist.distributed import StopRequest, gather_rows, in_blocks, local_blocks, sum_over_ranks
from eae_dist.model.autoencoder import to_unit
from eae_dist.numerics.keyed_random import derive_key
from eae_dist.objectives import Objective
from eae_dist.training.engines import engine_of


@torch.no_grad()
def validate(accelerator: Accelerator, objective: Objective, config: Config, stop: StopRequest) -> dict[str, float] | None:
    """Returns the terms of the objective on at most train.validation_images of the split; None after a stop request.

    The result is the same on any number of ranks. Noise depends on the image numbers and is the same in every validation, so that
    checkpoints can be compared.
    """
    objective.eval()
    key = derive_key(config.train.seed)
    seen, blocks = [np.zeros(0, dtype=np.int64)], []
    data, count = config.data, config.train.validation_images
    assert data.validation is not None  # else there is nothing to call this for
    for batch in walk(data.root, data.validation, config.evaluate.batch, count=count, cache=Cache.of(data)):
        with engine_of(accelerator).autocast():
            blocks.append(objective.per_row(to_unit(batch["image"], accelerator.device), batch["number"], key))
        seen.append(batch["number"])
        if stop.signalled:
            break
    if stop.asked_now():
        objective.train()
        return None
    numbers = np.concatenate(seen)
    if not blocks:  # more ranks than blocks: this rank has no rows, but the same terms
        image = torch.zeros(1, *objective.autoencoder.image_shape, device=accelerator.device)
        blocks.append({name: rows[:0] for name, rows in objective.per_row(image, np.zeros(1), key).items()})
    per_row = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
    rows = int(sum_over_ranks(torch.tensor(len(numbers), device=accelerator.device)))
    shared = None
    if v := config.train.blocks:  # block i of V has the images that rank i of V ranks would have
        starts = [blocks_of(rows, config.evaluate.batch, block, v)[0] * config.evaluate.batch for block in range(v)]
        shared = local_blocks(np.array([*starts, rows]).clip(max=rows), numbers)
    with in_blocks(shared):
        terms = objective.terms(per_row, None, rows, numbers, key)
    objective.train()
    means = gather_rows(torch.stack([term.double() for term in terms.values()])[None]).mean(0)
    return dict(zip(terms, means.tolist(), strict=True))
