"""Batch norm with statistics over the rows of all ranks. It runs on any device and can be differentiated twice.

`nn.SyncBatchNorm` rejects CPU tensors and has no second derivative. This implementation uses the batch-norm kernels of ATen on
this rank's rows, plus one sum over ranks in each direction. On one rank it is `F.batch_norm`, which saves a tenth of a step of
`small` on a CPU; but a step of `rae_gp`, which is differentiated twice, would take a tenth more (`twice_differentiated`).
n: elements per channel over all ranks. v: blocks of this rank (`distributed.blocks`), one if training has no blocks.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from eae_dist.distributed import active_blocks, block_sizes, joined, one_per_block, split_rows, sum_of_blocks, world_size


class GlobalBatchNorm(nn.Module):
    """Batch norm over the rows (and pixels) of all ranks: [b, c] or [b, c, h, w] -> same shape.

    Ranks may hold different numbers of rows. Eval mode uses the running statistics, without communication.
    affine=False: no scale and no shift, as the latent of the entropic autoencoder needs. track=False: no running statistics;
    those of the batch are always used. twice_differentiated: on a CPU, use the kernels that are fastest if the result is
    differentiated twice.
    """

    twice_differentiated = False
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    seen: torch.Tensor

    def __init__(self, num_features: int, affine: bool = True, *, eps: float = 1e-3, momentum: float = 0.1, track: bool = True):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features) if track else None)
        self.register_buffer("running_var", torch.ones(num_features) if track else None)
        # The sum of this rank's sums since the last finite_norms(): finite as long as every input was.
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the normalized rows, in the shape of x."""
        evaluating = self.running_mean is not None and not self.training
        alone = world_size() == 1 and active_blocks() is None and (x.is_cuda or not self.twice_differentiated)
        if evaluating or alone:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, not evaluating, self.momentum, self.eps
            )
        return self.over_ranks(x)

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the training result of `forward` from our own code, on any device and any number of ranks."""
        weight, bias = (None if p is None else _once_per_block(p) for p in (self.weight, self.bias))
        out, mean, variance, count, sums = _GlobalBatchNorm.apply(x, weight, bias, self.eps, *block_sizes(len(x)))
        self.seen += sums
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)).to(variance.dtype), self.momentum)
        return out

    def extra_repr(self) -> str:
        """Returns the options for printing."""
        affine, track = self.weight is not None, self.running_mean is not None
        return f"affine={affine}, eps={self.eps}, momentum={self.momentum}, track={track}"


def finite_norms(network: nn.Module) -> torch.Tensor | None:
    """Returns the number of norms, in network order, before the first one that saw a non-finite input since the last call.

    A norm spreads NaN to the rows of all ranks, so the error started on the ranks with the smallest number. None for a network
    without norms.
    """
    seen = [module.seen for module in network.modules() if isinstance(module, GlobalBatchNorm)]
    if not seen:
        return None
    finite = torch.stack(seen).isfinite().long().cumprod(0).sum()
    torch._foreach_zero_(seen)
    return finite


def _once_per_block(parameter: nn.Parameter) -> torch.Tensor:
    """Returns the parameter once per block of this rank, [c] -> [v, c]."""
    blocks = active_blocks()
    return parameter[None] if blocks is None else torch.stack(blocks.weights(parameter))


class _GlobalBatchNorm(torch.autograd.Function):
    """(x, weight [v, c] or None, bias [v, c] or None, eps, sizes, ordered) -> (y, mean [c], biased variance [c], n, sums).

    Only y is differentiable. sizes, ordered: from `block_sizes`. sums: the sum of this rank's part of all sums, float64: one
    number that is finite if they are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        sizes: tuple[int, ...],
        ordered: bool,
    ) -> tuple[torch.Tensor, ...]:
        wide, c = torch.promote_types(x.dtype, torch.float32), x.shape[1]
        # Sum and sum of squares about the mean of a block, then over all blocks in float64 to avoid cancellation.
        mine = torch.stack([_moments(part, wide) for part in x.split(sizes)])
        sums = mine.sum()
        total, squares, count = sum_of_blocks(mine.unbind(), ordered).split([c, c, 1])
        mean = total / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        ctx.inverse_count = 1 / count
        mean, variance = mean.to(wide), variance.to(wide)
        ctx.eps, ctx.sizes, ctx.ordered = eps, sizes, ordered
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance, count, sums)
        weight, bias = (None if p is None else p[0] for p in (weight, bias))
        return _normalize(x, weight, bias, mean, variance, eps), mean, variance, count, sums

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, variance = ctx.saved_tensors
        sizes, ordered = ctx.sizes, ctx.ordered
        if torch.is_grad_enabled():  # create_graph=True needs differentiable operations
            return *_differentiable_backward(x, weight, dy, ctx.inverse_count, ctx.eps, sizes, ordered), None, None, None
        inverse = (variance + ctx.eps).rsqrt()
        # Each block's part of sum dy xhat and sum dy.
        sums = [_channel_sums(*part, mean, inverse) for part in zip(dy.split(sizes), x.split(sizes), strict=True)]
        dx = None
        if ctx.needs_input_grad[0]:
            both = sum_of_blocks([torch.cat(part).double() for part in sums], ordered) * ctx.inverse_count
            mean_with_normalized, mean_alone = both.to(inverse.dtype).chunk(2)
            # dx = w/s (dy - mean(dy) - xhat mean(dy xhat)): an affine map of x, computed by the kernel, plus a multiple of dy.
            scale = inverse if weight is None else inverse * weight[0]
            dx = _normalize(x, -scale * mean_with_normalized, -scale * mean_alone, mean, variance, ctx.eps)
            scale = scale.view(1, -1, *[1] * (x.ndim - 2))
            # One pass if the types agree. A scale rounded to bfloat16 would be wrong by 0.4 % in the whole channel.
            dx = dx.addcmul_(dy, scale) if dy.dtype == scale.dtype else dx.add_(dy * scale)
        with_normalized, alone = (None if weight is None else torch.stack(part) for part in zip(*sums, strict=True))
        return dx, with_normalized, alone, None, None, None


def _moments(x: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Returns the sums over rows and pixels of x and x^2, and their number n: float64 [2c + 1]."""
    rows = x.numel() // x.shape[1]
    center = x.sum([0, *range(2, x.ndim)], dtype=wide) / max(rows, 1)
    about_center, total = _channel_sums(x, x, center, torch.ones_like(center))
    total, center, about_center = total.double(), center.double(), about_center.double()
    return torch.cat([total, about_center + center * total, torch.full_like(total[:1], rows)])


def _channel_sums(
    dy: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, inverse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the sums over rows and pixels of dy (x - mean) inverse and of dy, [c] x 2, by the batch-norm backward of ATen."""
    if not len(x):  # a rank without rows: the kernel would divide by zero
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, with_normalized, alone = torch.ops.aten.native_batch_norm_backward(
        dy, x, torch.ones_like(mean), None, None, mean, inverse, True, 0.0, [False, True, True]
    )
    return with_normalized, alone


def _normalize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    if not len(x):
        return torch.empty_like(x)
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]


def _differentiable_backward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    dy: torch.Tensor,
    inverse_count: torch.Tensor,
    eps: float,
    sizes: tuple[int, ...],
    ordered: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Returns gradients for x, weight and bias, from operations that can be differentiated again across ranks."""
    dims, shape, v = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2)), len(sizes)
    inverse_count = inverse_count.to(x.dtype)
    xs, dys = (split_rows(x, sizes), split_rows(dy, sizes)) if ordered else ((x,), (dy,))
    mean = one_per_block(sum_of_blocks([part.sum(dims) for part in xs], ordered) * inverse_count, v, ordered)
    centered = [part - m.view(shape) for part, m in zip(xs, mean, strict=True)]
    variance = sum_of_blocks([part.square().sum(dims) for part in centered], ordered) * inverse_count
    inverse = one_per_block((variance + eps).rsqrt(), v, ordered)
    normalized = [part * i.view(shape) for part, i in zip(centered, inverse, strict=True)]
    sums = [torch.stack([(d * xhat).sum(dims), d.sum(dims)]) for d, xhat in zip(dys, normalized, strict=True)]
    means = one_per_block(sum_of_blocks(sums, ordered) * inverse_count, v, ordered)
    scale = inverse if weight is None else [i * w for i, w in zip(inverse, weight, strict=True)]
    dx = [
        s.view(shape) * (d - alone.view(shape) - xhat * with_normalized.view(shape))
        for s, d, xhat, (with_normalized, alone) in zip(scale, dys, normalized, means, strict=True)
    ]
    whole = joined(dx) if ordered else dx[0]
    if weight is None:
        return whole, None, None
    with_normalized, alone = torch.stack(sums).unbind(1)
    return whole, with_normalized, alone
