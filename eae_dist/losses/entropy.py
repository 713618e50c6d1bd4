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
from eae_dist.precision import full_precision

QUERY_TILE, KEY_TILE = 2048, 2048  # 16 MiB of float32: larger tiles fall out of the caches, smaller ones call more
BLOCK = 16  # columns whose minimum is taken first


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
    Computed in float32 (float64 stays float64) whatever autocast and TF32's switches say.
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
        # Autocast stays on inside forward, and would take the products to bfloat16; TF32 gives 1 row in 1,000 a wrong neighbor.
        with full_precision(latents.device):
            local = latents.detach().to(torch.promote_types(latents.dtype, torch.float32)).contiguous()
            counts = row_counts(len(local), local.device, group)
            n, d, world = sum(counts), local.shape[1], world_size(group)
            if not 1 <= k < n:
                compared = "a global batch" if group is None else "groups (objective.group)"
                raise ValueError(
                    f"objective.k={k} needs {compared} of more than {max(k, 1)} distinct rows, got {n}; "
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

    Half squared distances, tile by tile. The queries are keys too: for k = 1 a tile between two parts of them serves both, its
    rows' neighbors along it and its columns' neighbors down it, and the tiles below the diagonal are left out.
    """
    b, n = len(queries), len(keys)
    padded = -(-n // BLOCK) * BLOCK
    keys = keys.roll(-offset, 0)  # the queries first
    # (|q|^2 + |k|^2)/2 - q.k as one product, [-q, 1, |q|^2/2] with [k, |k|^2/2, 1].
    half_norm, one = keys.square().sum(1, keepdim=True).mul_(0.5), keys.new_ones(n, 1)
    queries = torch.cat([-queries, one[:b], half_norm[:b]], 1)
    keys = torch.nn.functional.pad(torch.cat([keys, half_norm, one], 1), (0, 0, 0, padded - n))

    symmetric = k == 1  # for more neighbors, looking at candidates again costs more than the products that it saves
    best = keys.new_full((b, k), math.inf), torch.zeros(b, k, dtype=torch.int64, device=keys.device)
    buffer = keys.new_empty(QUERY_TILE * min(KEY_TILE, padded))
    for row in range(0, b, QUERY_TILE):
        query = queries[row : row + QUERY_TILE]
        for column in range(row if symmetric else 0, padded, KEY_TILE):
            key = keys[column : column + KEY_TILE]
            tile = buffer[: QUERY_TILE * len(key)].view(QUERY_TILE, len(key))
            torch.mm(query, key.T, out=tile[: len(query)])
            # What fills up the last blocks is infinitely far, and so is each query from itself.
            tile[len(query) :] = math.inf
            tile[:, max(n - column, 0) :] = math.inf
            if column <= row < column + len(key):
                tile.diagonal(row - column).fill_(math.inf)
            # Along the rows: a block's columns lie a stride apart, so that the minima are taken along whole vectors.
            stride = len(key) // BLOCK
            blocks = tile[: len(query)].view(-1, BLOCK, stride)
            keep_nearest(best, row, buffer, blocks, blocks.amin(1), column, stride, 1)
            # Down the columns, for the queries below this row of tiles.
            start, stop = QUERY_TILE if column == row else 0, b - column
            if symmetric and start < stop:
                blocks = tile.view(-1, BLOCK, len(key))[..., start:stop]
                keep_nearest(best, column + start, buffer, blocks.permute(2, 1, 0), blocks.amin(1).T, row, 1, BLOCK)
    return (best[1] + offset) % n


def keep_nearest(
    best,
    start: int,
    buffer: torch.Tensor,
    blocks: torch.Tensor,
    minima: torch.Tensor,
    origin: int,
    place_step: int,
    block_step: int,
):
    """Merges candidates of the queries from `start` on into `best`, their k smallest values and ids so far, two [b, k].

    blocks: [m, BLOCK, blocks], a view of the flat buffer; minima: [m, blocks], the smallest of each. The candidate at (place,
    block) has the id origin + place place_step + block block_step. Two levels: a query's k smallest lie in the k blocks with the
    smallest minima, and only queries for which a minimum improves on the k-th best are looked at.
    """
    best_value, best_id = (x[start : start + len(blocks)] for x in best)
    k = best_value.shape[1]
    row = (minima.amin(1) < best_value[:, -1]).nonzero()
    improved = row[:, 0]
    block = _smallest(minima.index_select(0, improved), min(k, minima.shape[1]))[1][:, None]  # [m', 1, up to k]
    place = torch.arange(BLOCK, device=blocks.device)[:, None]
    strides = blocks.stride()
    at = (row * strides[0])[..., None] + place * strides[1] + block * strides[2] + blocks.storage_offset()
    candidates = buffer.index_select(0, at.flatten()).view(at.shape).flatten(1)
    if k == 1:  # the improvement is the nearest
        best_value[improved], chosen = _smallest(candidates, 1)
        best_id[improved] = chosen * place_step + block[:, 0] * block_step + origin
        return
    ids = (place * place_step + block * block_step + origin).flatten(1)
    best_value[improved], chosen = _smallest(torch.cat([best_value[improved], candidates], 1), k)
    best_id[improved] = torch.cat([best_id[improved], ids], 1).gather(1, chosen)


def _smallest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k smallest of each row, ascending, and where: [b, m] -> two of [b, k]."""
    return x.min(1, keepdim=True) if k == 1 else x.topk(k, 1, largest=False, sorted=True)
