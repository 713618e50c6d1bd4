"""The engines that a launch can select. Only the code in this module differs between them.

    PyTorch     one process, or DDP over several                    launch/cpu.yaml, torchrun, srun, accelerate launch alone
    DeepSpeed   ZeRO-1 (optimizer state split over the ranks)       launch/deepspeed_zero1.yaml
                or ZeRO-2 (gradients as well)                       launch/deepspeed_zero2.yaml

Both average gradients over ranks, so that they minimize the mean loss over ranks. Both keep weights and the state of Adam in
float32. Both write the same checkpoints in the format of PyTorch: whole weights, and the state of every parameter by number.
"""

import os
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eae_dist.config import Config, TrainConfig
from eae_dist.distributed import gradient_tree, set_group_timeouts, world_size
from eae_dist.distributed.collectives import is_initialized
from eae_dist.errors import UserError

MOMENTS = ("exp_avg", "exp_avg_sq")  # state of Adam: one entry per weight each


def uses_deepspeed(env: Mapping[str, str]) -> bool:
    """True if the launch selects DeepSpeed."""
    return env.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def accelerator_options(config: TrainConfig, cpu: bool) -> dict:
    """Returns the arguments of Accelerator for the engine of the launch. Raises UserError if that engine cannot work.

    What is not passed accelerate takes from its own settings, which the run's configuration does not show.
    """
    own = {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1), "dynamo_backend": "no"}
    if uses_deepspeed(os.environ):
        if missing := [name for name in ("deepspeed", "transformers") if find_spec(name) is None]:  # accelerate imports both
            raise UserError(f"the launch asks for DeepSpeed, but {missing} are not installed: pip install -e '.[deepspeed]'")
        if not is_initialized():
            raise UserError(
                "ACCELERATE_USE_DEEPSPEED=true asks for DeepSpeed, but no launcher started this process as a rank; start it with "
                "accelerate launch --config_file launch/deepspeed_zero2.yaml or torchrun, or unset ACCELERATE_USE_DEEPSPEED"
            )
        if cpu and torch.cuda.is_available():
            raise UserError("train.device=cpu: DeepSpeed uses all visible GPUs; hide them with CUDA_VISIBLE_DEVICES=")
        # torch 2.14 renames a function that DeepSpeed calls.
        warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
        if cpu:
            import deepspeed

            # Without this, the first start compiles an operator for CPU inference, which takes a minute and a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # cpu=True would select DDP; without a backend name every CPU rank would be a separate run.
        backend = InitProcessGroupKwargs(backend="gloo" if cpu else None)
        return {"mixed_precision": "no", "kwargs_handlers": [backend], **own}  # DeepSpeed.prepare sets the precision
    # The buffers of GlobalBatchNorm are already equal on all ranks.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    # Without cpu=True accelerate silently makes W separate runs of one rank.
    precision = "no" if config.precision == "fp32" else config.precision
    return {"cpu": cpu, "mixed_precision": precision, "kwargs_handlers": [ddp], **own}


def engine_of(accelerator: Accelerator) -> "PyTorch | DeepSpeed":
    """Returns the engine of an accelerator."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return DeepSpeed(accelerator) if deepspeed else PyTorch(accelerator)


class PyTorch:
    """PyTorch without DeepSpeed: one process, or DDP."""

    name = "PyTorch"
    needs_ddp_warmup = True  # the first backward pass of DDP differs from the later ones
    optimizer_state_is_copy = False  # the next step changes the tensors of its optimizer state

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, config: Config, lanes: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns the wrapped model and optimizer for a step. Raises ValueError if ranks would train separate models."""
        model, prepared_optimizer = self.accelerator.prepare(objective, optimizer)
        if world_size() > 1 and not isinstance(model, DistributedDataParallel):
            raise UserError(f"accelerate did not wrap the model for {world_size()} ranks; check the file given to --config_file")
        if config.train.blocks:
            # Of weights with a single channel, gradients of blocks have another stride in the side of 1, which means nothing.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
        if config.train.blocks and world_size() > 1:
            model.register_comm_hook([], gradient_tree)
        return model, prepared_optimizer

    def autocast(self) -> AbstractContextManager:
        """Returns a context with the precision of a step, for a forward pass outside of a step."""
        return self.accelerator.autocast()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> torch.Tensor:
        """Takes one step with the gradient, clipped to clip_norm; returns the norm of the gradient before clipping."""
        self.accelerator.unscale_gradients(optimizer)
        parameters = [
            parameter for parameter in model.parameters() if parameter.grad is not None
        ]  # parameters of the user's network may be frozen
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
        return norm

    def optimizer_state(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Returns the whole state of the optimizer, which `load` accepts under both engines. Call on every rank."""
        return optimizer.state_dict()

    def load(self, objective: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, state: dict) -> None:
        """Loads weights, buffers and the state of the optimizer. Call on every rank, after `prepare`."""
        objective.load_state_dict(weights)
        optimizer.load_state_dict(state)


class DeepSpeed:
    """DeepSpeed with ZeRO stage 1 or 2. Its batch and clipping settings come from our configuration."""

    needs_ddp_warmup = False
    optimizer_state_is_copy = True  # its optimizer state is a copy, gathered from all ranks

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.settings: dict = accelerator.deepspeed_plugin.deepspeed_config  # the settings from which the engine is built
        self.name = f"DeepSpeed ZeRO-{self.settings['zero_optimization']['stage']}"

    def prepare(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, config: Config, lanes: int
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        """Returns the engine and its optimizer. Raises ValueError for settings that it does not support (see refuse)."""
        self.refuse(config, lanes)
        batch = config.train.global_batch
        figures = {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch // world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.train.clip_norm or 0.0,
        }
        self.settings |= figures
        # torch_autocast is used, because DeepSpeed's own bf16 rounds the weights but not the buffers. The list of modules is
        # empty, so that all gradients are averaged in float32.
        bf16 = config.train.precision == "bf16"
        self.settings["torch_autocast"] = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        objective.to(memory_format=torch.contiguous_format)  # the flat tensors of DeepSpeed have no channels_last format
        engine, prepared_optimizer = self.accelerator.prepare(objective, optimizer)
        taken = {
            "train_batch_size": engine.train_batch_size(),
            "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
            "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
            "gradient_clipping": engine.gradient_clipping(),
        }
        if taken != figures:
            raise UserError(f"DeepSpeed took {taken} instead of {figures}; remove these from the file of its settings")
        set_group_timeouts(config.train.timeout)  # DeepSpeed made groups of its own
        return engine, prepared_optimizer

    def refuse(self, config: Config, lanes: int) -> None:
        """Raises ValueError for settings that do not work, or that do not have the same meaning as under DDP."""
        train, zero = config.train, self.settings["zero_optimization"]
        ddp = "or launch without DeepSpeed"
        if train.accumulate > 1:
            raise UserError(
                f"train.accumulate={train.accumulate} needs whole gradients on every rank, but DeepSpeed's ZeRO splits "
                f"them; set train.accumulate=1, {ddp}"
            )
        if train.fused:
            raise UserError(
                f"train.fused=true: the bits of the fused optimizer depend on the sizes of its tensors, and DeepSpeed has others "
                f"than PyTorch; set train.fused=false, {ddp}"
            )
        if train.blocks:
            raise UserError(
                f"train.blocks={train.blocks} needs sums over ranks in its own order, but DeepSpeed's ZeRO adds gradients in "
                f"another; set train.blocks=0, {ddp}"
            )
        if lanes % world_size():
            raise UserError(
                f"DeepSpeed needs the same batch on every rank, but {world_size()} ranks do not divide the {lanes} lanes of the "
                f"data; change the ranks, data.lanes or train.global_batch={train.global_batch}, {ddp}"
            )
        if train.precision == "fp16":
            raise UserError(
                f"train.precision=fp16: DeepSpeed would clip the scaled gradient and not lower the scale after an overflow; "
                f"take train.precision=bf16, {ddp}"
            )
        if train.channels_last:
            raise UserError(f"train.channels_last=true: DeepSpeed's flat tensors do not support this layout; leave it out, {ddp}")
        if zero.get("stage") not in (1, 2):
            raise UserError(f"zero_optimization.stage={zero.get('stage')} of DeepSpeed's settings: take 1 or 2, {ddp}")
        own = [name for name in ("fp16", "bf16") if self.settings.get(name, {}).get("enabled")]
        own += [name for name in ("optimizer", "scheduler") if name in self.settings]
        own += [name for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device", "none") != "none"]
        if own:
            raise UserError(
                f"{own} in DeepSpeed's settings: the run's own configuration sets precision, optimizer and schedule, and its "
                f"state stays on the ranks' devices; remove them, {ddp}"
            )

    def autocast(self) -> AbstractContextManager:
        """Returns a context with the precision of a step, for a forward pass outside of a step."""
        enabled = self.settings["torch_autocast"]["enabled"]
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def step(self, model: Any, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> torch.Tensor:
        """Returns the norm of the gradient before clipping; accelerator.backward has already taken the step."""
        return torch.as_tensor(model.get_global_grad_norm(), device=self.accelerator.device)

    def optimizer_state(self, objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
        """Returns the whole state of the optimizer, which `load` accepts under both engines. Call on every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        (local,) = optimizer.state.values()  # ZeRO gives the optimizer one flat tensor with this rank's part of all weights
        parameters = list(objective.parameters())
        state = {
            number: {"step": local["step"].clone()}
            | {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
            for number, parameter in enumerate(parameters)
            if parameter.requires_grad
        }
        group = {**optimizer.param_groups[0], "params": list(range(len(parameters)))}
        return {"state": state, "param_groups": [group]}

    def load(self, objective: nn.Module, optimizer: torch.optim.Optimizer, weights: dict, state: dict) -> None:
        """Loads weights, buffers and the state of the optimizer. Call on every rank, after `prepare`."""
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        objective.load_state_dict(weights)
        trained = [(number, parameter) for number, parameter in enumerate(objective.parameters()) if parameter.requires_grad]
        (group,), (saved,) = optimizer.param_groups, state["param_groups"]
        group |= {name: value for name, value in saved.items() if name != "params"}
        # Adam creates its state in the first step; only then can DeepSpeed map it to parameters. It is created here instead.
        (split,) = group["params"]
        step = next(iter(state["state"].values()))["step"]
        optimizer.state[split] = {"step": step.clone()} | {name: torch.zeros_like(split) for name in MOMENTS}
        lazy_init_hp_params_optimizer_state([parameter for _, parameter in trained], split, optimizer.state)
        for number, parameter in trained:
            safe_set_full_fp32_param(parameter, parameter.data)  # the float32 copy that the optimizer updates
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, state["state"][number][name].to(parameter.device), name)
