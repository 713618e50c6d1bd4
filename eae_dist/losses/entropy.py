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
from eae_dist.numerics.precision import full_precision

CPU_TILE, GPU_TILE = 512, 2048  # sides of tiles: 1 MiB of float32 stays in a core's own cache; a GPU wants fewer, larger calls


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
    The gradient is right where every rank backpropagates the same upstream factor, as losses averaged by DDP do. Of neighbors
    that are equally far it takes one; which one depends on the number of ranks.
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
            neighbors = nearest_neighbors(keys, k, offset, len(local))
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
def nearest_neighbors(keys: torch.Tensor, k: int, offset: int, b: int) -> torch.Tensor:
    """Ids of the k nearest other keys of the b queries, which are the keys from offset on: [n, d] -> int64 [b, k], nearest first.

    Half squared distances are made tile by tile, and of a tile only the minima over blocks of keys are kept: a query's k nearest
    lie in the k blocks with the smallest minima, and only the distances to these blocks' keys are made again. For k = 1 a tile
    between two parts of the queries serves both, its rows' neighbors along it and its columns' neighbors down it, and the tiles
    below the diagonal are left out. Call under `full_precision`.
    """
    n, device = len(keys), keys.device
    symmetric = k == 1  # for more neighbors, merging the two directions costs more than the products that it saves
    members = 16 if symmetric else 4  # keys of a block: many leave few minima, few leave few distances to make again
    largest_side = CPU_TILE if device.type == "cpu" else GPU_TILE
    blocks = -(-n // (members * -(-n // largest_side)))  # of a tile: the fewest tiles, all of one size
    side = members * blocks
    tiles, parts = -(-n // side), -(-b // side)

    keys = keys.roll(-offset, 0)  # the queries first
    keys = keys - keys.mean(0)  # far from the origin the products would cancel
    # (|q|^2 + |k|^2)/2 - q.k as one product, [-q, 1, |q|^2/2] with [k, |k|^2/2, 1]; what fills the last tile is infinitely far.
    half_norm, one = keys.square().sum(1, keepdim=True).mul_(0.5), keys.new_ones(n, 1)
    queries = torch.cat([-keys, one, half_norm], 1)[:b]
    keys = torch.nn.functional.pad(torch.cat([keys, half_norm, one], 1), (0, 0, 0, tiles * side - n))
    keys[n:, -2] = math.inf
    key_tiles = keys.view(tiles, side, -1).mT.unbind()

    # Member i of block j of tile t is the key t side + i blocks + j, so that minima are taken along whole vectors.
    spread = torch.arange(0, side, blocks, device=device)
    buffer = keys.new_empty(max(largest_side**2, k * members * keys.shape[1]))  # a tile, then the keys that are looked at again
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
                tile.diagonal().fill_(math.inf)  # each query is infinitely far from itself
            torch.amin(rows, 1, out=least)
            if symmetric and part < column < parts:
                torch.amin(tile.view(members, blocks, side), 0, out=down[column])

        smallest, block = _smallest_of_tiles(minima, k)
        block += first * blocks
        if symmetric:
            block = torch.where(best[start:stop, None] < smallest, best_block[start:stop, None], block)
            # The queries below this part, by the minima down its tiles.
            nearest = down[part + 1 : parts].amin(1).flatten()[: b - stop]
            improved = (nearest < best[stop:]).nonzero()[:, 0]
            column, place = part + 1 + improved // side, improved % side
            best[stop + improved], better_block = down[column, :, place].min(1)
            best_block[stop + improved] = part * blocks + better_block
        candidates = (block // blocks * side + block % blocks)[..., None] + spread
        ids[start:stop] = _nearest_of(candidates.flatten(1), query, keys, k, start, buffer)
    return (ids + offset) % n


def _smallest_of_tiles(minima: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's k smallest, ascending, and their blocks' numbers over all tiles: [tiles, rows, blocks] -> [rows, up to k] x 2.

    They lie at the k places within a tile whose smallest minima, over the tiles, are smallest.
    """
    tiles, _, blocks = minima.shape
    place = _smallest(minima.amin(0), min(k, blocks))[1]
    at_places = minima.gather(2, place.expand(tiles, -1, -1)).permute(1, 0, 2).flatten(1)
    smallest, at = _smallest(at_places, min(k, at_places.shape[1]))
    return smallest, at // place.shape[1] * blocks + place.gather(1, at % place.shape[1])


def _nearest_of(
    candidates: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, k: int, start: int, buffer: torch.Tensor
) -> torch.Tensor:
    """The k nearest of each query's candidates, ids [rows, m] -> [rows, k]; query i itself is key start + i.

    queries and keys: as the products take them. buffer: where the candidates' keys are put.
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
    """The k smallest of each row, ascending, and where: [b, m] -> two of [b, k]."""
    return x.min(1, keepdim=True) if k == 1 else x.topk(k, 1, largest=False, sorted=True)
