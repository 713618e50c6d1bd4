"""How the networks are executed: memory layout, kernels of norms, compilation, and checkpointing of activations.

These options change the time and memory of a step, but not the result. Checkpoints are the same, so a run may change them.
"""

from typing import Any

import torch
from torch import nn

from eae_dist.config import TrainConfig
from eae_dist.errors import UserError
from eae_dist.model.networks import Layers
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.objectives import Objective


def set_execution(objective: Objective, config: TrainConfig, device: torch.device) -> None:
    """Applies the options of the configuration to the networks. Raises ValueError if one is not possible or has no effect."""
    autoencoder = objective.autoencoder
    if config.channels_last is False:  # the networks are built with channels_last
        autoencoder.to(memory_format=torch.contiguous_format)
    if objective.twice_differentiated:
        for layer in autoencoder.decoder.modules():
            if isinstance(layer, GlobalBatchNorm):
                layer.twice_differentiated = True
    if config.checkpoint_activations:
        checkpoint_activations(autoencoder)
    if config.compile:
        check_compiler(device)
        compile_networks(objective)


def compile_networks(objective: Objective, **options: Any) -> None:
    """Compiles encoder and decoder in place; the names of the weights do not change. options: passed to torch.compile."""
    autoencoder = objective.autoencoder
    autoencoder.encoder.compile(**options)
    if not objective.twice_differentiated:  # torch.compile cannot do that
        autoencoder.decoder.compile(**options)


def checkpoint_activations(network: nn.Module) -> None:
    """Makes all Layers in the network keep one activation per block. Raises ValueError if that saves nothing."""
    layers = [module for module in network.modules() if isinstance(module, Layers)]
    if not any(block.has_inner_activations() for module in layers for block in module.blocks()):
        raise UserError(
            "train.checkpoint_activations=true recomputes batch norms, but no network has them in its "
            "eae_dist.model.networks.Layers, a kind of nn.Sequential; set train.checkpoint_activations=false"
        )
    for module in layers:
        module.checkpointed = True


def check_compiler(device: torch.device) -> None:
    """Raises ValueError if torch.compile does not work here, usually because there is no C++ compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # torch.compile raises many types
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"train.compile=true needs what torch.compile needs on {device.type}: {said}") from error
