"""How the networks are run: in which layout, compiled or not, with which activations kept.

It changes how long a step takes and how much memory, not what is learned; checkpoints are the same, and a run may switch.
"""

import torch
from torch import nn

from eae_dist.config import TrainConfig
from eae_dist.model.networks import Layers
from eae_dist.objectives import Objective


def set_execution(objective: Objective, config: TrainConfig, device: torch.device) -> None:
    """Sets up the networks as the configuration says. Raises ValueError where that is not possible, or would do nothing."""
    autoencoder = objective.autoencoder
    if config.channels_last is False:  # they are built channels last
        autoencoder.to(memory_format=torch.contiguous_format)
    if config.checkpoint_activations:
        checkpoint_activations(autoencoder)
    if config.compile:
        check_compiler(device)
        compile_networks(objective)


def compile_networks(objective: Objective, **options) -> None:
    """Compiles encoder and decoder, in place: the names of the weights stay. options: of torch.compile."""
    autoencoder = objective.autoencoder
    autoencoder.encoder.compile(**options)
    if not objective.twice_differentiated:  # which torch.compile cannot
        autoencoder.decoder.compile(**options)


def checkpoint_activations(network: nn.Module) -> None:
    """Lets all Layers in the network keep one activation of a block. Raises ValueError if there is nothing to gain."""
    layers = [module for module in network.modules() if isinstance(module, Layers)]
    if not any(block.has_inner_activations() for module in layers for block in module.blocks()):
        raise ValueError(
            "train.checkpoint_activations=true computes batch norms again, but no network has them in its "
            "eae_dist.model.networks.Layers, which are nn.Sequential; set train.checkpoint_activations=false"
        )
    for module in layers:
        module.checkpointed = True


def check_compiler(device: torch.device) -> None:
    """Raises ValueError if torch.compile cannot work here, for want of a C++ compiler as a rule."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # of many kinds, from all that takes part
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"train.compile=true needs what torch.compile needs on {device.type}: {said}") from error
