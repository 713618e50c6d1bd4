"""Batch norm whose statistics are those of the global batch, over all ranks, on any device and twice differentiable.

`nn.SyncBatchNorm` refuses CPU tensors and has no second derivative. This one is built from ATen's batch-norm kernels over
this rank's rows, plus one sum over ranks each way. On one GPU it is `F.batch_norm`. On one CPU it takes 1 to 2 times as long as
that, some 4 % of a step of `small`, but a step of `rae_gp`, which is differentiated twice, takes a tenth less.
n: elements per channel over all ranks.
"""

import torch
import torch.nn.functional as F
from torch import nn

from eae_dist.distributed import sum_over_ranks, world_size


class GlobalBatchNorm(nn.Module):
    """Batch norm over the rows (and pixels) of all ranks: [b, c] or [b, c, h, w] -> same shape.

    Ranks may hold unequal numbers of rows. In eval mode the running statistics are used and nothing is communicated.
    affine=False: no scale, no shift, as the entropic autoencoder's latent wants. track=False: always the batch's statistics.
    """

    def __init__(self, num_features: int, affine: bool = True, *, eps: float = 1e-3, momentum: float = 0.1, track: bool = True):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_mean", torch.zeros(num_features) if track else None)
        self.register_buffer("running_var", torch.ones(num_features) if track else None)
        # Whether this rank's rows were, in the passes since `finite_norms` asked.
        self.register_buffer("finite", torch.tensor(True), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        evaluating = self.running_mean is not None and not self.training
        if evaluating or (x.is_cuda and world_size() == 1):
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, not evaluating, self.momentum, self.eps
            )
        return self.over_ranks(x)

    def over_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """The same from our own kernels, whatever the device and the number of ranks."""
        out, mean, variance, count, finite = _GlobalBatchNorm.apply(x, self.weight, self.bias, self.eps)
        self.finite &= finite
        if self.running_mean is not None:
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)).to(variance.dtype), self.momentum)
        return out

    def extra_repr(self) -> str:
        affine, track = self.weight is not None, self.running_mean is not None
        return f"affine={affine}, eps={self.eps}, momentum={self.momentum}, track={track}"


def finite_norms(network: nn.Module) -> int | torch.Tensor:
    """How many norms, in the order of the network, have seen finite rows of this rank before one did not, since last asked.

    A norm carries what is not a number to the rows of all ranks: those with the fewest are where it came from.
    """
    norms = [module for module in network.modules() if isinstance(module, GlobalBatchNorm)]
    seen = torch.stack([norm.finite for norm in norms]).long().cumprod(0).sum() if norms else 0
    for norm in norms:
        norm.finite.fill_(True)
    return seen


class _GlobalBatchNorm(torch.autograd.Function):
    """(x, weight or None, bias or None, eps) -> (y, mean [c], biased variance [c], n, finite); only y is differentiable.

    finite: whether this rank's part of the sums is, before the others' comes to it.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = x.numel() // x.shape[1]
        # Sum and sum of squares about this rank's mean, then in float64 over all ranks, where they no longer cancel.
        center = x.sum([0, *range(2, x.ndim)], dtype=wide) / max(rows, 1)
        about_center, total = _channel_sums(x, x, center, torch.ones_like(center))
        total, center, about_center = total.double(), center.double(), about_center.double()
        squares = about_center + center * total
        count = torch.full_like(total[:1], rows)
        finite = (total + squares).isfinite().all()
        total, squares, count = sum_over_ranks(torch.cat([total, squares, count])).split([len(total), len(total), 1])
        mean = total / count
        variance = (squares / count - mean.square()).clamp_(min=0)
        ctx.inverse_count = 1 / count
        mean, variance = mean.to(wide), variance.to(wide)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.mark_non_differentiable(mean, variance, count, finite)
        return _normalize(x, weight, bias, mean, variance, eps), mean, variance, count, finite

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mean, variance = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the same in differentiable arithmetic
            return *_differentiable_backward(x, weight, dy, ctx.inverse_count, ctx.eps), None
        inverse = (variance + ctx.eps).rsqrt()
        with_normalized, alone = _channel_sums(dy, x, mean, inverse)  # sum dy xhat, sum dy: this rank's part
        dx = None
        if ctx.needs_input_grad[0]:
            both = sum_over_ranks(torch.cat([with_normalized, alone]).double()) * ctx.inverse_count
            mean_with_normalized, mean_alone = both.to(inverse.dtype).chunk(2)
            # dx = w/s (dy - mean(dy) - xhat mean(dy xhat)): an affine map of x, which the kernel makes, plus one of dy.
            scale = inverse if weight is None else inverse * weight
            dx = _normalize(x, -scale * mean_with_normalized, -scale * mean_alone, mean, variance, ctx.eps)
            scale = scale.view(1, -1, *[1] * (x.ndim - 2))
            # One pass where the types agree; a scale rounded to bfloat16 would be off by 0.4 % in all of a channel.
            dx = dx.addcmul_(dy, scale) if dy.dtype == scale.dtype else dx.add_(dy * scale)
        return dx, None if weight is None else with_normalized, None if weight is None else alone, None


def _channel_sums(dy, x, mean, inverse) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over rows and pixels of dy (x - mean) inverse, and of dy, two [c]: ATen's batch-norm backward without its dx."""
    if not len(x):  # a rank without rows; the kernel would divide by their number
        return torch.zeros_like(mean), torch.zeros_like(mean)
    _, with_normalized, alone = torch.ops.aten.native_batch_norm_backward(
        dy, x, torch.ones_like(mean), None, None, mean, inverse, True, 0.0, [False, True, True]
    )
    return with_normalized, alone


def _normalize(x, weight, bias, mean, variance, eps) -> torch.Tensor:
    if not len(x):
        return torch.empty_like(x)
    return torch.native_batch_norm(x, weight, bias, mean, variance, False, 0.0, eps)[0]


def _differentiable_backward(x, weight, dy, inverse_count, eps):
    """Gradients for x, weight and bias from operations that can be differentiated again, across ranks."""
    dims, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
    inverse_count = inverse_count.to(x.dtype)
    mean = sum_over_ranks(x.sum(dims)) * inverse_count
    centered = x - mean.view(shape)
    variance = sum_over_ranks(centered.square().sum(dims)) * inverse_count
    inverse = (variance + eps).rsqrt()
    normalized = centered * inverse.view(shape)
    with_normalized, alone = (dy * normalized).sum(dims), dy.sum(dims)
    mean_with_normalized, mean_alone = (sum_over_ranks(torch.stack([with_normalized, alone])) * inverse_count).unbind()
    scale = inverse if weight is None else inverse * weight
    dx = scale.view(shape) * (dy - mean_alone.view(shape) - normalized * mean_with_normalized.view(shape))
    return dx, None if weight is None else with_normalized, None if weight is None else alone
