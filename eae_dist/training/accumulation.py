"""The exact gradient of a batch that does not fit into memory: `train.accumulate` micro-batches with one batch of latents.

The latent norm, the entropy and the MMD are those of all n rows of the batch, over all ranks; only the networks process it in
parts. There are three stages (the two encoder passes are those of GradCache, Gao et al. 2021):

    1. Encode every micro-batch without gradient, and keep the encoder outputs h, [b, d] per rank.
    2. Compute z = norm(h). Decode every micro-batch and keep dL/dz. Add the gradient of the penalties on the latents of the
       whole batch. Backpropagate both to dL/dh.
    3. Encode every micro-batch again with gradient, and backpropagate dL/dh into the encoder.

Micro-batch a of A has the rows of the global batch whose numbers are a modulo A, so it is the same on any number of ranks.
Batch norms inside the networks see one micro-batch over all ranks. Gradients are averaged over ranks once, at the end. Under
train.blocks, each block sums its gradients over the passes, and these sums are then added as a tree over blocks and ranks.
"""

from contextlib import AbstractContextManager
from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from eae_dist.distributed import Blocks, add_tensors_over_ranks, average_over_ranks, in_blocks, local_blocks, rank
from eae_dist.model.autoencoder import to_unit
from eae_dist.model.networks import frozen_statistics, one_power_iteration
from eae_dist.numerics.keyed_random import derive_key
from eae_dist.objectives import Latents, Objective


def accumulate(
    accelerator: Accelerator, objective: Objective, batch: dict, global_batch: int, row_ids: np.ndarray, key: int, parts: int
) -> dict[str, torch.Tensor]:
    """Adds the gradient of one batch, averaged over ranks, to the parameters; returns the terms as `Objective.forward` does.

    batch: this rank's rows. global_batch: n. row_ids: numbers of these rows in the global batch, int64 [b]. key: key of all
    random draws of the batch. parts: number of micro-batches, at most b. Call on every rank, with the unwrapped objective.
    """
    device, autoencoder, edges = accelerator.device, objective.autoencoder, objective.block_edges
    blocks = None if edges is None else local_blocks(edges, row_ids, leaves=True)
    # The rows of the whole batch are sorted by micro-batch, but with blocks they keep their order, because a block has neighbors.
    order = np.argsort(row_ids % parts, kind="stable") if edges is None else np.arange(len(row_ids))
    row_ids = row_ids[order]
    is_first_copy = None if batch["distinct"] else batch["first"][order].to(device)
    # As uint8 the whole batch is small. It is sorted on the device, because the host does not wait for a copy of pinned memory.
    images_of_batch = batch["image"].to(device, non_blocking=True)[placed(order, device)]
    rows_of = [np.flatnonzero(row_ids % parts == part) for part in range(parts)]
    at = [placed(rows, device) for rows in rows_of]
    back = placed(np.argsort(np.concatenate(rows_of)), device)  # restores the order of the rows from that of the micro-batches
    scaled = (lambda loss: loss) if accelerator.scaler is None else accelerator.scaler.scale

    def blocks_of(part: int) -> AbstractContextManager[Blocks | None]:
        if blocks is None or edges is None:
            return in_blocks(None)
        return in_blocks(replace(blocks, sizes=local_blocks(edges, row_ids[rows_of[part]]).sizes))

    def images(part: int) -> torch.Tensor:
        return to_unit(images_of_batch[at[part]], device)

    def encoder_output(part: int) -> torch.Tensor:
        if blocks is None:  # random layers of the user draw the same in both passes; under blocks there are none
            torch.manual_seed(derive_key(key, rank(), part))
        with accelerator.autocast():  # a new context per pass: its cache from a pass without gradient has no gradient
            return objective.encoder_output(images(part), row_ids[rows_of[part]], key)

    def decoded(part: int, latents: Latents) -> dict[str, torch.Tensor]:
        with accelerator.autocast():
            return objective.decoded(latents, images(part), row_ids[rows_of[part]], key)

    with one_power_iteration(autoencoder), in_blocks(blocks):
        # 1. The encoder outputs of all rows.
        encoded = []
        for part in range(parts):
            with torch.no_grad(), blocks_of(part):
                encoded.append(encoder_output(part))
        outputs = torch.cat(encoded)[back].requires_grad_()

        # 2. The latents of the whole batch, their gradient through the decoder per micro-batch, and that of batch penalties.
        latents = objective.latents(outputs)
        leaves = [None if x is None else x.detach().requires_grad_() for x in latents]
        kept: list[dict[str, torch.Tensor]] = []
        for part, rows in enumerate(at):
            mean, log_sigma = (None if x is None else x[rows] for x in leaves)
            assert mean is not None  # only the deviations can be missing
            with blocks_of(part):
                per_row = decoded(part, (mean, log_sigma))
                loss = objective.weighted(objective.terms_of_rows(per_row, global_batch))
            scaled(loss).backward()
            kept.append({name: row.detach() for name, row in per_row.items() if name != "latent"})
        per_row = {name: torch.cat([here[name] for here in kept])[back] for name in kept[0]} | {"latent": latents[0]}
        terms = objective.terms(per_row, is_first_copy, global_batch, row_ids, key)
        pulled = sum(
            (x * leaf.grad).sum()
            for x, leaf in zip(latents, leaves, strict=True)
            if x is not None and leaf is not None and leaf.grad is not None
        )
        (pulled + scaled(terms["loss"])).backward()

        # 3. The gradient of the encoder.
        assert outputs.grad is not None  # the backward pass above has set it
        with frozen_statistics(autoencoder.encoder):
            for part, rows in enumerate(at):
                with blocks_of(part):
                    output = encoder_output(part)
                (output * outputs.grad[rows]).sum().backward()
    if blocks is None:
        average_over_ranks(p.grad for p in objective.parameters() if p.grad is not None)
    else:
        add_tensors_over_ranks(blocks.take_gradients())
    return {name: term.detach() for name, term in terms.items()}


def placed(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Returns row numbers on the device; the host does not wait for a GPU."""
    return torch.from_numpy(rows).to(device, non_blocking=True)
