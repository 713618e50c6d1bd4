"""A network of the user, `package.module:Class`: how it is imported, and what it may not do.

It is a class with the arguments that `model.encoder` and `model.decoder` describe.
"""

import importlib
import inspect
import sys
from typing import Any

from torch import nn

from eae_dist.errors import UserError
from eae_dist.model.norm import GlobalBatchNorm


def own_network(name: str, key: str, arguments: dict) -> nn.Module:
    """Builds the network of the user: `package.module:Class`, called with keyword arguments.

    Raises ValueError that names the key of the configuration.
    """
    cls = own_class(name, key)
    try:
        inspect.signature(cls).bind(**arguments)
    except TypeError as error:
        raise UserError(f"{key}={name} cannot be called with {', '.join(arguments)} by keyword: {error}") from error
    network = cls(**arguments)
    refuse_local_norms(network, key)
    return network


def own_class(name: str, key: str) -> type[nn.Module]:
    """Imports the nn.Module class `package.module:Class`. Raises ValueError that names the key of the configuration."""
    found = imported(name, key, "package.module:Class")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{key}={name} is not a class derived from torch.nn.Module")
    return found


def imported(name: str, key: str, form: str) -> Any:
    """Imports what the user names as `package.module:attribute`; form: how the error says that.

    Raises UserError if it is not there. An error inside of the user's module is raised as it is.
    """
    module, _, attribute = name.partition(":")
    try:
        if not module or module.startswith("."):
            raise ModuleNotFoundError("a module is missing before the colon", name=module)
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        own = f"{module}.".startswith(f"{absent}.") or (isinstance(error, AttributeError) and module in sys.modules)
        if not own:
            raise
        raise UserError(f"{key}={name} cannot be imported as {form} ({error})") from error


def refuse_local_norms(network: nn.Module, key: str) -> None:
    """Raises UserError if a network of the user normalizes with statistics of one rank, or of the images of a batch alone."""
    for name, layer in network.named_modules():
        if isinstance(layer, GlobalBatchNorm) and layer.running_mean is None:
            raise UserError(
                f"{key}: layer {name!r} is a GlobalBatchNorm with track=False: an image's latent would depend on the images "
                f"beside it, and the ranks would wait for each other where one draws pictures alone; leave track=False out"
            )
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            raise UserError(
                f"{key}: layer {name!r} is {type(layer).__name__}, whose statistics would differ between ranks; "
                f"use eae_dist.model.norm.GlobalBatchNorm"
            )
