"""Networks that work block by block (`distributed.blocks`), so that their sums have the same bits on any number of ranks.

A network of one's own is tried first: what cannot be cut into blocks is refused with the key of the configuration.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from eae_dist.distributed import Blocks, active_blocks, in_blocks, joined, split_rows
from eae_dist.distributed.collectives import add_pairwise
from eae_dist.errors import UserError
from eae_dist.model.networks import one_power_iteration
from eae_dist.model.norm import GlobalBatchNorm

EXACT = (nn.ReLU, nn.Flatten, nn.Unflatten, nn.Identity)  # modules with the same bits for any number of rows
TRIED = 64  # rows of a trial: a sigmoid of 33 numbers in a row, where one of them can round otherwise, does in 3 rows of 100


def run_by_block(network: nn.Module, key: str) -> None:
    """Makes the parts of a network work block by block under `in_blocks`, with the weights once per block.

    A part is a module with a forward pass that holds no batch norm and lies in no other part, so its rows do not know each other.
    Raises UserError that names the key of the configuration for a module that cannot be taken apart.
    """
    parts = list(_parts_without_norm(network))
    inside = {layer for _, part in parts for layer in part.modules()}
    for name, layer in network.named_modules():
        if layer not in inside and not isinstance(layer, GlobalBatchNorm) and any(True for _ in layer.parameters(recurse=False)):
            raise UserError(
                f"train.blocks: {key} has a module ({name or type(layer).__name__}) with parameters of its own and a batch norm "
                f"inside or beside it, which cannot run block by block; move the parameters into a module without batch norm"
            )
    for name, part in parts:
        if not isinstance(part, EXACT):
            part.forward = _ByBlock(part, f"train.blocks: the module {name or type(part).__name__} of {key}")


def _parts_without_norm(network: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    has_forward = type(network).forward is not nn.Module.forward  # a list of modules has none: its owner calls what is in it
    if has_forward and not any(isinstance(layer, GlobalBatchNorm) for layer in network.modules()):
        yield name, network
    else:
        for of_child, child in network.named_children():
            yield from _parts_without_norm(child, f"{name}.{of_child}".lstrip("."))


class _ByBlock:
    """The forward pass of a module that runs block by block. about: how an error begins.

    Raises UserError for a tensor without a row for each image, and for a module that changes its buffers.
    """

    def __init__(self, module: nn.Module, about: str):
        self._module, self._forward, self._about = module, module.forward, about

    def __call__(self, *given: Any, **named: Any) -> torch.Tensor:
        blocks, module = active_blocks(), self._module
        if blocks is None:
            return self._forward(*given, **named)
        inputs, rows = (*given, *named.values()), sum(blocks.sizes)
        shapes = [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)]
        if not shapes or any(shape[:1] != (rows,) for shape in shapes):
            raise UserError(f"{self._about} gets tensors {shapes} for {rows} images; each needs a row for every image")
        # A block gets its rows of each tensor, and everything else as it is.
        cut = [split_rows(x, blocks.sizes) if isinstance(x, torch.Tensor) else [x] * len(blocks.sizes) for x in inputs]
        weights = {name: blocks.weights(parameter) for name, parameter in module.named_parameters()}
        done = []
        with one_power_iteration(module):
            before = [buffer._version for buffer in module.buffers()]
            for number, parts in enumerate(zip(*cut, strict=True)):
                of_block = {name: each[number] for name, each in weights.items()}
                options = dict(zip(named, parts[len(given) :], strict=True))
                with in_blocks(None):  # a block is not cut again
                    done.append(functional_call(module, of_block, parts[: len(given)], options))
            if before != [buffer._version for buffer in module.buffers()]:
                raise UserError(f"{self._about} keeps statistics of its images, which differ between ranks; leave it out")
        return joined(done)


def try_by_block(network: nn.Module, key: str, rows: torch.Tensor) -> None:
    """Raises UserError unless every row gives the same bits beside others as alone; rows: an input of the network, [TRIED, ...].

    What a module with a batch norm computes between its parts is not cut into blocks, so its bits must be those without others.
    The network is in eval mode here, in which batch norms do not communicate.
    """
    network.eval()
    for some in rows.split(8):
        of_rows, of_weights = _outcome(network, key, some)
        alone = [_outcome(network, key, row) for row in some.split(1)]
        expected = [torch.cat(parts) for parts in zip(*(rows for rows, _ in alone), strict=True)]
        expected += [add_pairwise(parts) for parts in zip(*(weights for _, weights in alone), strict=True)]
        if not all(map(torch.equal, [*of_rows, *of_weights], expected)):
            raise UserError(
                f"train.blocks: {key} rounds otherwise if it works on another number of images at a time; move what a module "
                f"with a batch norm inside computes by itself, such as an activation, into a module without batch norm"
            )
    network.train()


def _outcome(network: nn.Module, key: str, rows: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns output and gradient of each row, and the gradients of the weights of the parts, where every row is a block."""
    rows = rows.detach().requires_grad_()
    with in_blocks(Blocks((1,) * len(rows), leaves=True)) as blocks:
        out = network(rows.clone())  # a network may change its input
    assert blocks is not None
    if out.requires_grad:
        out.backward(out.detach())
    of_norms = {weight for layer in network.modules() if isinstance(layer, GlobalBatchNorm) for weight in layer.parameters()}
    beside = [name for name, weight in network.named_parameters() if weight.grad is not None and weight not in of_norms]
    if beside:
        raise UserError(
            f"train.blocks: {key} uses the weights {', '.join(beside)} outside of the forward pass of their module; move that "
            f"into a module without batch norm"
        )
    weights = blocks.take_gradients()
    network.zero_grad()
    return [out.detach(), *([] if rows.grad is None else [rows.grad])], weights
