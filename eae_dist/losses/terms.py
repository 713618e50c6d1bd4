"""Pure loss terms on this rank's rows; every term returns a *share*, and the mean of the shares over ranks is the global term."""

import torch

from eae_dist.distributed import world_size


def squared_error(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Sum of squares per image, [b, c, h, w] x 2 -> [b], in float32 or better. Raises ValueError for unequal shapes."""
    if reconstruction.shape != images.shape:
        raise ValueError(f"the decoder (model.decoder) made {tuple(reconstruction.shape)} of images {tuple(images.shape)}")
    difference = reconstruction.to(images.dtype) - images
    return difference.square().flatten(1).sum(1)


def mean_share(per_row: torch.Tensor, rows: int) -> torch.Tensor:
    """This rank's share W/n * sum of a mean over n = rows of all ranks, [b] -> scalar; ranks may hold unequal numbers."""
    return per_row.sum() * (world_size() / rows)
