"""The Kozachenko-Leonenko nearest-neighbor entropy of the global batch.

    H(z) = (d/n) sum_i log R_i + log V_d + psi(n) - psi(k)          [nats]

R_i: distance from row i to its k-th nearest other row, V_d: volume of the unit d-ball (Kozachenko & Leonenko 1987; for k > 1
Goria et al. 2005). n rows over all W ranks, b here, d dimensions.

The neighbors are searched without gradient in matrix-product form, in tiles that stay in the cache; the distances of the
chosen pairs are then computed again by direct difference, because the product form cancels for close pairs. The whole
gradient, of both ends of every pair and across ranks, is built in forward, so that backward communicates nothing.
"""

import math
from typing import NamedTuple

import torch

from eae_dist.distributed import gather_padded, rank, row_counts, world_size

QUERY_TILE, KEY_TILE = (
    512,
    4096,
)  # 8 MiB of float32: two cores' level-2 caches; larger tiles fall out, smaller ones call more
BLOCK = 32  # columns whose minimum is taken first


class EntropyTerms(NamedTuple):
    """`entropy`: this rank's share in nats. `floored`: how many of its pairs lie closer than sqrt(eps2), int64."""

    entropy: torch.Tensor
    floored: torch.Tensor


def knn_entropy(
    latents: torch.Tensor,
    *,
    k: int = 1,
    average_k: bool = False,
    eps2: float = 1e-4,
    valid: torch.Tensor | None = None,
    group=None,
) -> torch.Tensor:
    """Entropy of the rows of all ranks, [b, d] -> scalar nats: this rank's share, whose mean over ranks is H.

    k: which neighbor; average_k takes the mean of log R over the first k, which halves the gradient's variance at k = 5.
    eps2: added to squared distances inside the log, so that a pair of duplicates has gradient 0 and every gradient is bounded;
        meant for latents of unit variance. valid: bool [b]; rows that are False are left out on both sides.
    The gradient is right where every rank backpropagates the same upstream factor, as losses averaged by DDP do.
    Computed in float32 (float64 stays float64) whatever autocast says.
    Raises ValueError unless k >= 1 and more than k rows are valid over all ranks.
    """
    return entropy_terms(latents, k=k, average_k=average_k, eps2=eps2, valid=valid, group=group).entropy


def entropy_terms(
    latents: torch.Tensor,
    *,
    k: int = 1,
    average_k: bool = False,
    eps2: float = 1e-4,
    valid: torch.Tensor | None = None,
    group=None,
) -> EntropyTerms:
    """As `knn_entropy`, with what the log shows beside it."""
    if latents.ndim != 2:
        raise ValueError(f"knn_entropy wants latents [rows, dimensions], got shape {tuple(latents.shape)}")
    rows = latents if valid is None else latents[valid]
    return EntropyTerms(*_KnnEntropy.apply(rows, k, average_k, eps2, group))


def log_unit_ball_volume(d: int) -> float:
    """log V_d of the unit ball in d dimensions."""
    return 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)


def gaussian_reference(
    n: int, d: int, *, k: int, average_k: bool, eps2: float, seed: int, draws: int = 4, device: torch.device | str = "cpu"
) -> float:
    """The estimate for n draws of N(0, I_d), batch-normed: what H of a batch is to be compared with, in nats.

    A reference, not a ceiling: the estimator is biased, and a batch that repels itself lies above it. Call on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    start, stop = rank() * n // world_size(), (rank() + 1) * n // world_size()
    shares = []
    for _ in range(draws):
        z = torch.randn(n, d, generator=generator).to(device)  # drawn on the CPU: the same on every device
        z = (z - z.mean(0)) / z.std(0, correction=0)
        shares.append(knn_entropy(z[start:stop], k=k, average_k=average_k, eps2=eps2))
    return float(gather_padded(torch.stack(shares).mean()[None], [1] * world_size()).mean())


class _KnnEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, latents, k, average_k, eps2, group):
        # Autocast stays on inside forward, and would take the products to bfloat16.
        with torch.autocast(latents.device.type, enabled=False):
            local = latents.detach().to(torch.promote_types(latents.dtype, torch.float32)).contiguous()
            counts = row_counts(len(local), local.device, group)
            n, d, world = sum(counts), local.shape[1], world_size(group)
            if not 1 <= k < n:
                raise ValueError(
                    f"objective.k={k} needs a global batch of more than {max(k, 1)} distinct rows, got {n}; "
                    f"lower objective.k (at least 1) or raise train.global_batch"
                )
            keys = gather_padded(local, counts, group)
            offset = sum(counts[: rank(group)])
            neighbors = nearest_neighbors(local, keys, k, offset)
            if not average_k:
                neighbors = neighbors[:, -1:]

            difference = local[:, None] - keys[neighbors]  # [b, m, d]; m = 1 or k
            squared = difference.square().sum(2)
            log_distance = 0.5 * torch.log(squared + eps2)
            m = neighbors.shape[1]
            orders = range(1, k + 1) if average_k else [k]
            psi = torch.tensor([n, *orders], dtype=torch.float64).digamma()
            constant = log_unit_ball_volume(d) + float(psi[0] - psi[1:].mean())
            share = log_distance.sum() * (d * world / (n * m)) + constant

            if ctx.needs_input_grad[0]:
                # W dH/dz of the local rows, which DDP's mean over ranks turns into dH/dz: as the row that asks ...
                pull = difference.mul_((d * world / (n * m)) / (squared + eps2)[..., None])
                gradient = pull.sum(1)
                # ... and as the neighbor, of rows on any rank. Only ids travel; the pulls of far rows are computed again.
                asking = torch.arange(offset, offset + len(local), device=local.device)[:, None].expand_as(neighbors)
                if world == 1:
                    gradient.index_add_(0, neighbors.flatten(), pull.flatten(0, 1), alpha=-1)
                else:
                    ids = gather_padded(neighbors.to(torch.int32), counts, group).long()
                    mine = (ids >= offset) & (ids < offset + len(local))
                    asking, slot = mine.nonzero(as_tuple=True)
                    asked = ids[asking, slot]
                    difference = keys[asking] - keys[asked]
                    squared_here = difference.square().sum(1)
                    pull = difference.mul_((d * world / (n * m)) / (squared_here + eps2)[:, None])
                    gradient.index_add_(0, asked - offset, pull, alpha=-1)
                ctx.save_for_backward(gradient.to(latents.dtype))
        floored = (squared < eps2).sum()
        ctx.mark_non_differentiable(floored)
        return share, floored

    @staticmethod
    def backward(ctx, upstream, _):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None, None, None


@torch.no_grad()
def nearest_neighbors(queries: torch.Tensor, keys: torch.Tensor, k: int, offset: int) -> torch.Tensor:
    """Ids of each query's k nearest keys, nearest first, [b, d] x [n, d] -> int64 [b, k]; query i itself is key offset + i.

    Two levels: a tile of half squared distances (less the query's own norm, constant in a row), the minimum of each block of 32
    of its columns, and then only the k best blocks: the k smallest entries of a row lie in the k blocks with the smallest
    minima. A block's columns lie a fixed stride apart, so that the minima are taken along whole vectors.
    """
    n = len(keys)
    padded = -(-n // BLOCK) * BLOCK
    # |k|^2/2 - q.k as one product, [-q, 1] with [k, |k|^2/2]; the columns that fill the last block are infinitely far.
    keys = torch.cat([keys, keys.square().sum(1, keepdim=True).mul_(0.5)], 1)
    keys = torch.nn.functional.pad(keys, (0, 0, 0, padded - n))
    keys[n:, -1] = math.inf
    queries = torch.cat([-queries, queries.new_ones(len(queries), 1)], 1)
    tile = keys.new_empty(min(QUERY_TILE, len(queries)) * min(KEY_TILE, padded))
    found = torch.empty(len(queries), k, dtype=torch.int64, device=keys.device)
    for row in range(0, len(queries), QUERY_TILE):
        query = queries[row : row + QUERY_TILE]
        best_value, best_id = None, None
        for column in range(0, padded, KEY_TILE):
            key = keys[column : column + KEY_TILE]
            half = tile[: len(query) * len(key)].view(len(query), len(key))
            torch.mm(query, key.T, out=half)
            own = row + offset - column  # the diagonal on which a query meets itself
            if -len(query) < own < len(key):
                half.diagonal(own).fill_(math.inf)
            blocks = half.view(len(query), BLOCK, -1)  # [queries, place in the block, block]
            stride = blocks.shape[2]
            block = _smallest(blocks.amin(1), min(k, stride))[1]
            value = blocks.gather(2, block[:, None].expand(-1, BLOCK, -1)).flatten(1)
            value, place = _smallest(value, min(k, value.shape[1]))
            ids = place // block.shape[1] * stride + block.gather(1, place % block.shape[1]) + column
            if best_value is not None:
                value, ids = torch.cat([best_value, value], 1), torch.cat([best_id, ids], 1)
                value, place = _smallest(value, min(k, value.shape[1]))
                ids = ids.gather(1, place)
            best_value, best_id = value, ids
        found[row : row + QUERY_TILE] = best_id
    return found


def _smallest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest of each row, ascending, and where: [b, m] -> two of [b, k]."""
    return x.min(1, keepdim=True) if k == 1 else x.topk(k, 1, largest=False, sorted=True)
