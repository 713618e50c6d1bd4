"""The Kozachenko-Leonenko nearest-neighbor entropy of the global batch.

    H(z) = (d/n) sum_i log R_i + log V_d + psi(n) - psi(k)          [nats]

R_i: distance from row i to its k-th nearest other row, V_d: volume of the unit d-ball (Kozachenko & Leonenko 1987; for k > 1
Goria et al. 2005). n: rows on all W ranks, b: rows on this rank, d: dimensions.
A *share* is the value of one rank; the mean of the shares over ranks is the value of the global batch.
A *floored pair* is a row and a neighbor at a distance below sqrt(eps2), where eps2 dominates the logarithm.

Under blocks (`distributed.blocks`) the value is that of the global batch on every rank. Each block searches its own neighbors.

The neighbor search uses matrix products without gradient, in tiles that fit into the cache. The distances of the chosen pairs
are then computed again by direct difference, because the product form cancels for close pairs. The forward pass builds the
whole gradient, for both rows of every pair and across ranks, so that the backward pass needs no communication.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from eae_dist.distributed import (
    block_sizes,
    gather_padded,
    in_blocks,
    local_blocks,
    rank,
    row_counts,
    sum_of_blocks,
    sum_over_ranks,
    world_size,
)
from eae_dist.errors import UserError
from eae_dist.numerics.precision import full_precision

PAIRS = 2**26  # pairs of neighbors times dimensions that are computed at once, 256 MiB of float32
CPU_TILE, GPU_TILE = 512, 2048  # tile sides: 1 MiB of float32 fits into a core's cache; a GPU needs fewer, larger calls


class EntropyTerms(NamedTuple):
    """`entropy`: this rank's share in nats. `floored`: its number of floored pairs, int64; under blocks, that of all ranks."""

    entropy: torch.Tensor
    floored: torch.Tensor


def knn_entropy(
    latents: torch.Tensor | np.ndarray,
    *,
    k: int = 1,
    average_k: bool = False,
    eps2: float = 1e-4,
    valid: torch.Tensor | None = None,
    counts: list[int] | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> torch.Tensor:
    """Returns this rank's share of the entropy of all ranks' rows in nats, [b, d] -> scalar; the mean over ranks is H.

    k: the k-th nearest neighbor is used. average_k: use the mean of log R over the first k, which halves the variance of the
        gradient at k = 5.
    eps2: added to squared distances inside the log, so that a pair of duplicates has gradient 0 and every gradient is bounded;
        it is meant for latents of unit variance.
    valid: bool [b]; rows that are False are neither queries nor neighbors.
    counts: the rows of each rank of the group, if they are known and all are valid. Otherwise the ranks tell each other, and the
        host waits for a GPU.
    The gradient is correct if every rank backpropagates the same upstream factor, as with losses averaged by DDP. Among equally
    distant neighbors it uses one; without blocks, the choice depends on the number of ranks.
    The computation is in float32 (float64 stays float64), regardless of autocast and TF32.
    Raises ValueError unless k >= 1 and more than k rows are valid over all ranks.
    """
    return entropy_terms(latents, k=k, average_k=average_k, eps2=eps2, valid=valid, counts=counts, group=group).entropy


def entropy_terms(
    latents: torch.Tensor | np.ndarray,
    *,
    k: int = 1,
    average_k: bool = False,
    eps2: float = 1e-4,
    valid: torch.Tensor | None = None,
    counts: list[int] | None = None,
    group: "dist.ProcessGroup | None" = None,
) -> EntropyTerms:
    """Returns `knn_entropy` and the number of floored pairs, for the same arguments."""
    latents = torch.as_tensor(latents)
    if latents.ndim != 2:
        raise ValueError(f"knn_entropy needs latents [rows, dimensions], got shape {tuple(latents.shape)}")
    rows, (sizes, ordered) = latents, block_sizes(len(latents))
    if valid is not None:
        rows = latents[valid]
        counts, of_blocks = None, torch.as_tensor(valid).split(sizes)
        sizes = tuple(int(part.sum()) for part in of_blocks) if ordered else (len(rows),)
    return EntropyTerms(*_KnnEntropy.apply(rows, k, average_k, eps2, counts, group, sizes, ordered))


def log_unit_ball_volume(d: int) -> float:
    """Returns log V_d of the unit ball in d dimensions."""
    return 0.5 * d * math.log(math.pi) - math.lgamma(0.5 * d + 1)


def gaussian_reference(
    n: int,
    d: int,
    *,
    k: int,
    average_k: bool,
    eps2: float,
    seed: int,
    draws: int = 4,
    device: torch.device | str = "cpu",
    blocks: int = 0,
) -> float:
    """Returns the entropy estimate in nats for n batch-normed draws of N(0, I_d), to compare H of a batch with.

    blocks: with their number (train.blocks), the value has the same bits on any number of ranks; 0: no blocks.
    The value is a reference, not an upper bound: the estimator is biased, and a batch whose rows repel each other can exceed it.
    Call on every rank.
    """
    generator = torch.Generator().manual_seed(seed)
    start, stop = rank() * n // world_size(), (rank() + 1) * n // world_size()
    shares = []
    with in_blocks(None if not blocks else local_blocks(np.arange(blocks + 1) * n // blocks, np.arange(start, stop))):
        for _ in range(draws):
            # Drawn on the CPU, so that the values are the same on every device.
            z = torch.randn(n, d, generator=generator).to(device)
            z = (z - z.mean(0)) / z.std(0, correction=0)
            shares.append(knn_entropy(z[start:stop], k=k, average_k=average_k, eps2=eps2))
    return float(gather_padded(torch.stack(shares).mean().double()[None], [1] * world_size()).mean())


class _KnnEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        latents: torch.Tensor,
        k: int,
        average_k: bool,
        eps2: float,
        counts: list[int] | None,
        group: "dist.ProcessGroup | None",
        sizes: tuple[int, ...],
        ordered: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # Autocast stays on inside forward and would use bfloat16 for the products; TF32 gives 1 row in 1,000 a wrong neighbor.
        with full_precision(latents.device):
            local = latents.detach().to(torch.promote_types(latents.dtype, torch.float32)).contiguous()
            counts = counts or row_counts(len(local), local.device, group)
            n, d, world = sum(counts), local.shape[1], world_size(group)
            if k < 1:
                raise UserError(f"k={k} must be at least 1")
            if k >= n:
                raise UserError(f"k={k} needs more than {k} distinct rows, got {n}")
            keys = gather_padded(local, counts, group)
            start = sum(counts[: rank(group)])
            starts = [start + sum(sizes[:block]) for block in range(len(sizes))]
            neighbors = torch.cat([nearest_neighbors(keys, k, *block) for block in zip(starts, sizes, strict=True)])
            if not average_k:
                neighbors = neighbors[:, -1:]

            m = neighbors.shape[1]  # 1 or k
            factor = d * (1 if ordered else world) / (n * m)
            pulls, log_distances, close = [], [], []
            for rows, nearest in zip(local.split(sizes), neighbors.split(sizes), strict=True):
                difference = rows[:, None] - keys[nearest]  # [b, m, d]
                squared = difference.square().sum(2)
                log_distances.append(0.5 * torch.log(squared + eps2).sum())
                close.append((squared < eps2).sum())
                if ctx.needs_input_grad[0]:
                    pulls.append(difference.mul_(factor / (squared + eps2)[..., None]))
            orders = range(1, k + 1) if average_k else [k]
            psi = torch.tensor([n, *orders], dtype=torch.float64).digamma()
            constant = log_unit_ball_volume(d) + float(psi[0] - psi[1:].mean())
            if ordered:
                total, floored = sum_of_blocks(log_distances, ordered), sum_over_ranks(torch.stack(close).sum())
            else:
                (total,), (floored,) = log_distances, close
            share = total * factor + constant

            if ctx.needs_input_grad[0]:
                # W dH/dz of the local rows; DDP's mean over ranks turns it into dH/dz. Under blocks, it is dH/dz at once.
                # First, the local rows as queries.
                gradients = [pull.sum(1) for pull in pulls]
                # Second, the local rows as neighbors of queries on any rank. Only ids are sent; pulls are computed again.
                if world == 1 and not ordered:
                    gradients[0].index_add_(0, neighbors.flatten(), pulls[0].flatten(0, 1), alpha=-1)
                else:
                    ids = gather_padded(neighbors.to(torch.int32), counts, group).long()
                    for first, gradient in zip(starts, gradients, strict=True):
                        if len(gradient):
                            _add_pulls_on(gradient, keys, ids, first, eps2, factor)
                ctx.save_for_backward(torch.cat(gradients).to(latents.dtype))
        ctx.mark_non_differentiable(floored)
        return share, floored

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), *[None] * 7


def _add_pulls_on(gradient: torch.Tensor, keys: torch.Tensor, ids: torch.Tensor, offset: int, eps2: float, scale: float) -> None:
    """Adds to the gradient of the rows of a block [b, d] what they get as neighbors.

    keys: [n, d]; ids: int64 [n, m], their neighbors. The rows are the keys from `offset` on. Pairs whose neighbor is another row
    are computed too and add zero: to leave them out, the host would wait until a GPU has counted them.
    """
    b = len(gradient)
    at_once = max(PAIRS // (ids.shape[1] * keys.shape[1]), 1)
    for asking, asked in zip(keys.split(at_once), ids.split(at_once), strict=True):
        mine = (asked >= offset) & (asked < offset + b)
        difference = asking[:, None] - keys[asked]
        squared = difference.square().sum(2)
        pull = difference.mul_(torch.where(mine, scale / (squared + eps2), 0.0)[..., None])
        gradient.index_add_(0, ((asked - offset) % b).flatten(), pull.flatten(0, 1), alpha=-1)


@torch.no_grad()
def nearest_neighbors(keys: torch.Tensor, k: int, offset: int, b: int) -> torch.Tensor:
    """Returns the ids of the k nearest other keys of each query: keys [n, d] -> int64 [b, k], nearest first.

    The queries are the b keys that start at offset. Half squared distances are computed in tiles, and only the minimum over each
    block of keys in a tile is kept: the k nearest keys of a query lie in the k blocks with the smallest minima, and only the
    distances to the keys of these blocks are computed again. For k = 1 a tile between two parts of the queries is used in both
    directions: its row minima give the neighbors of its rows, its column minima those of its columns. The tiles below the
    diagonal are then not computed. Call under `full_precision`.
    """
    n, device = len(keys), keys.device
    symmetric = k == 1  # for k > 1, merging the two directions costs more than the saved products
    members = 16 if symmetric else 4  # keys per block: large blocks give few minima, small blocks few distances to recompute
    largest_side = CPU_TILE if device.type == "cpu" else GPU_TILE
    blocks = -(-n // (members * -(-n // largest_side)))  # per tile: as few tiles as possible, all of the same size
    side = members * blocks
    tiles, parts = -(-n // side), -(-b // side)

    keys = keys.roll(-offset, 0)  # puts the queries first
    keys = keys - keys.mean(0)  # the products would cancel for keys far from the origin
    # (|q|^2 + |k|^2)/2 - q.k as one product of [-q, 1, |q|^2/2] and [k, |k|^2/2, 1]. Padding has an infinite distance.
    half_norm, one = keys.square().sum(1, keepdim=True).mul_(0.5), keys.new_ones(n, 1)
    queries = torch.cat([-keys, one, half_norm], 1)[:b]
    keys = torch.nn.functional.pad(torch.cat([keys, half_norm, one], 1), (0, 0, 0, tiles * side - n))
    keys[n:, -2] = math.inf
    key_tiles = keys.view(tiles, side, -1).mT.unbind()

    # Member i of block j of tile t is the key t side + i blocks + j, so that minima are over contiguous vectors.
    spread = torch.arange(0, side, blocks, device=device)
    buffer = keys.new_empty(max(largest_side**2, k * members * keys.shape[1]))  # a tile, then the candidates' keys
    along, down = keys.new_empty(tiles, side, blocks), keys.new_empty(tiles if symmetric else 0, blocks, side)
    best, best_block = keys.new_full((b,), math.inf), torch.zeros(b, dtype=torch.int64, device=device)
    ids = torch.empty(b, k, dtype=torch.int64, device=device)
    for part in range(parts):
        start, stop = part * side, min((part + 1) * side, b)
        query = queries[start:stop]
        first = part if symmetric else 0
        tile = buffer[: len(query) * side].view(-1, side)
        rows, minima = tile.view(-1, members, blocks), along[first:, : len(query)]
        for column, least in enumerate(minima, first):
            torch.mm(query, key_tiles[column], out=tile)
            if column == part:
                tile.diagonal().fill_(math.inf)  # a query is not its own neighbor
            torch.amin(rows, 1, out=least)
            if symmetric and part < column < parts:
                torch.amin(tile.view(members, blocks, side), 0, out=down[column])

        smallest, block = _smallest_of_tiles(minima, k)
        block += first * blocks
        if symmetric:
            block = torch.where(best[start:stop, None] < smallest, best_block[start:stop, None], block)
            # The queries after this part use the column minima of its tiles. On a GPU all of them look for the block of the
            # minimum, because the host would wait for the number of those that improve; a CPU is faster with these alone.
            improved = torch.arange(b - stop, device=device)
            if device.type == "cpu":
                nearest = down[part + 1 : parts].amin(1).flatten()[: b - stop]
                improved = improved[nearest < best[stop:]]
            columns, places = part + 1 + improved // side, improved % side
            nearest, better_block = down[columns, :, places].min(1)
            improved += stop
            better = nearest < best[improved]
            best[improved] = torch.where(better, nearest, best[improved])
            best_block[improved] = torch.where(better, part * blocks + better_block, best_block[improved])
        candidates = (block // blocks * side + block % blocks)[..., None] + spread
        ids[start:stop] = _nearest_of(candidates.flatten(1), query, keys, k, start, buffer)
    return (ids + offset) % n


def _smallest_of_tiles(minima: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k smallest minima of each row, ascending, and their blocks: [tiles, rows, blocks] -> [rows, up to k] x 2.

    Block numbers count over all tiles. For each place in a tile the minimum over tiles is taken; the k smallest minima lie at the
    k places where it is smallest.
    """
    tiles, _, blocks = minima.shape
    place = _smallest(minima.amin(0), min(k, blocks))[1]
    at_places = minima.gather(2, place.expand(tiles, -1, -1)).permute(1, 0, 2).flatten(1)
    smallest, at = _smallest(at_places, min(k, at_places.shape[1]))
    return smallest, at // place.shape[1] * blocks + place.gather(1, at % place.shape[1])


def _nearest_of(
    candidates: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, k: int, start: int, buffer: torch.Tensor
) -> torch.Tensor:
    """Returns the k nearest candidates of each query, ids [rows, m] -> [rows, k]; query i itself is key start + i.

    queries, keys: the extended factors of the products. buffer: memory for the keys of the candidates.
    """
    nearest = []
    m, width = candidates.shape[1], keys.shape[1]
    rows = len(buffer) // (m * width)
    for few, query in zip(candidates.split(rows), queries.split(rows), strict=True):
        chosen = buffer[: few.numel() * width].view(-1, width)
        torch.index_select(keys, 0, few.flatten(), out=chosen)
        distance = chosen.view(-1, m, width).bmm(query[..., None])[..., 0]
        distance[few == torch.arange(start, start + len(few), device=few.device)[:, None]] = math.inf
        nearest.append(few.gather(1, _smallest(distance, k)[1]))
        start += len(few)
    return torch.cat(nearest)


def _smallest(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k smallest entries of each row, ascending, and their columns: [b, m] -> [b, k] x 2."""
    return x.min(1, keepdim=True) if k == 1 else x.topk(k, 1, largest=False, sorted=True)
