"""The exact gradient of a batch that does not fit into memory: `train.accumulate` micro-batches with one batch of latents.

The latent norm, the entropy and the MMD are those of all n rows of the batch, over all ranks; only the networks process it in
parts. There are three stages (the two encoder passes are those of GradCache, Gao et al. 2021):

    1. Encode every micro-batch without gradient, and keep the encoder outputs h, [b, d] per rank.
    2. Compute z = norm(h). Decode every micro-batch and keep dL/dz. Add the gradient of the penalties on the latents of the
       whole batch. Backpropagate both to dL/dh.
    3. Encode every micro-batch again with gradient, and backpropagate dL/dh into the encoder.

Micro-batch a of A has the rows of the global batch whose numbers are a modulo A, so it is the same on any number of ranks.
Batch norms inside the networks see one micro-batch over all ranks. Gradients are averaged over ranks once, at the end.
"""

import numpy as np
import torch
from accelerate import Accelerator

from eae_dist.distributed import average_over_ranks, rank
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
    device, autoencoder = accelerator.device, objective.autoencoder
    ids_of = [row_ids[row_ids % parts == part] for part in range(parts)]
    split = [len(here) for here in ids_of]
    order = torch.from_numpy(np.argsort(row_ids % parts, kind="stable"))  # sorts rows by micro-batch
    is_first_copy = None if batch["distinct"] else batch["first"][order].to(device)
    # As uint8 the whole batch is small. It is sorted on the device, because the host does not wait for a copy of pinned memory.
    images = batch["image"].to(device, non_blocking=True)[order.to(device, non_blocking=True)].split(split)
    row_ids = np.concatenate(ids_of)
    scaled = (lambda loss: loss) if accelerator.scaler is None else accelerator.scaler.scale

    def encoder_output(part: int) -> torch.Tensor:
        torch.manual_seed(derive_key(key, rank(), part))  # random layers of the user draw the same in both passes
        with accelerator.autocast():  # a new context per pass: its cache from a pass without gradient has no gradient
            return objective.encoder_output(to_unit(images[part], device), ids_of[part], key)

    def decoded(part: int, latents: Latents) -> dict[str, torch.Tensor]:
        with accelerator.autocast():
            return objective.decoded(latents, to_unit(images[part], device), ids_of[part], key)

    with one_power_iteration(autoencoder):
        # 1. The encoder outputs of all rows.
        with torch.no_grad():
            outputs = torch.cat([encoder_output(part) for part in range(parts)])

        # 2. The latents of the whole batch, their gradient through the decoder per micro-batch, and that of batch penalties.
        outputs.requires_grad_()
        latents = objective.latents(outputs)
        leaves = [None if x is None else x.detach().requires_grad_() for x in latents]
        kept: list[dict[str, torch.Tensor]] = []
        for part, here in enumerate(zip(*(parts * [None] if x is None else x.split(split) for x in leaves), strict=True)):
            per_row = decoded(part, here)
            scaled(objective.weighted(objective.terms_of_rows(per_row, global_batch))).backward()
            kept.append({name: row.detach() for name, row in per_row.items() if name != "latent"})
        per_row = {name: torch.cat([here[name] for here in kept]) for name in kept[0]} | {"latent": latents[0]}
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
            for part, gradient in enumerate(outputs.grad.split(split)):
                (encoder_output(part) * gradient).sum().backward()
    average_over_ranks(p.grad for p in objective.parameters() if p.grad is not None)
    return {name: term.detach() for name, term in terms.items()}
