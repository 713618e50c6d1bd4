"""What differs between the engines that a launch can ask for; everything else is the same code for both.

    PyTorch     one process, or DDP over several                    launch/cpu.yaml, torchrun, srun, accelerate launch alone
    DeepSpeed   ZeRO-1 (optimizer state split over the ranks)       launch/deepspeed_zero1.yaml
                or ZeRO-2 (gradients as well)                       launch/deepspeed_zero2.yaml

Both average gradients over ranks, so that the mean of the ranks' losses is what is minimized, and both keep weights and Adam's
state in float32. Checkpoints are those of PyTorch under either: whole weights, and the state of every parameter by its number.
"""

import os
import warnings
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib.util import find_spec

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from eae_dist.config import Config, TrainConfig
from eae_dist.distributed import world_size

MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, an entry each per weight


def accelerator_options(config: TrainConfig, cpu: bool) -> dict:
    """How accelerate is to be started for the engine that the launch asks for. Raises ValueError where that one cannot work."""
    timeout = timedelta(seconds=config.timeout)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        if missing := [name for name in ("deepspeed", "transformers") if find_spec(name) is None]:  # accelerate imports both
            raise ValueError(f"the launch asks for DeepSpeed, but {missing} are not installed: pip install -e '.[deepspeed]'")
        if cpu and torch.cuda.is_available():
            raise ValueError("train.device=cpu: DeepSpeed takes the GPUs it sees; hide them with CUDA_VISIBLE_DEVICES=")
        # torch 2.14 renames a function that DeepSpeed calls.
        warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
        if cpu:
            import deepspeed

            # An operator for inference on CPUs, which otherwise every first start compiles, for a minute and with a compiler.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # cpu=True would mean DDP, and without the name of a backend every CPU rank would be a run of its own.
        backend = InitProcessGroupKwargs(backend="gloo" if cpu else None, timeout=timeout)
        return {"mixed_precision": "no", "kwargs_handlers": [backend]}  # precision: see DeepSpeed.prepare
    # GlobalBatchNorm keeps its buffers equal by itself.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    handlers = [ddp, InitProcessGroupKwargs(timeout=timeout)]
    # Without cpu=True accelerate makes W separate runs of one rank, without a word.
    return {"cpu": cpu, "mixed_precision": "no" if config.precision == "fp32" else config.precision, "kwargs_handlers": handlers}


def engine_of(accelerator: Accelerator) -> "PyTorch | DeepSpeed":
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return DeepSpeed(accelerator) if deepspeed else PyTorch(accelerator)


class PyTorch:
    """One process, or DDP."""

    name = "PyTorch"
    needs_ddp_warmup = True  # DDP's first backward pass is not like the later ones
    optimizer_state_is_copy = False  # its optimizer's state is the tensors that the next step changes

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Adam, config: Config, lanes: int):
        """The model and the optimizer that a step is taken with. Raises ValueError if ranks would train models of their own."""
        model, prepared_optimizer = self.accelerator.prepare(objective, optimizer)
        if world_size() > 1 and not isinstance(model, DistributedDataParallel):
            raise ValueError(f"accelerate did not wrap the model for {world_size()} ranks; check the file given to --config_file")
        return model, prepared_optimizer

    def autocast(self) -> AbstractContextManager:
        """The precision of a step, for a forward pass outside of one."""
        return self.accelerator.autocast()

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> torch.Tensor:
        """One step along the gradient, scaled down to clip_norm where it is longer; its norm before that."""
        self.accelerator.unscale_gradients(optimizer)
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]  # a user's may be frozen
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
        return norm

    def optimizer_state(self, objective: nn.Module, optimizer: torch.optim.Adam) -> dict:
        """The whole optimizer's state, as `load` takes it under any engine. Call on every rank."""
        return optimizer.state_dict()

    def load(self, objective: nn.Module, optimizer: torch.optim.Adam, weights: dict, state: dict) -> None:
        """Puts back weights and buffers, and the optimizer's state. Call on every rank, after `prepare`."""
        objective.load_state_dict(weights)
        optimizer.load_state_dict(state)


class DeepSpeed:
    """ZeRO stage 1 or 2. Every figure that it takes from a configuration of its own is ours."""

    needs_ddp_warmup = False
    optimizer_state_is_copy = True  # its optimizer's state is a copy, made of all ranks'

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.settings: dict = accelerator.deepspeed_plugin.deepspeed_config  # what the engine is built from
        self.name = f"DeepSpeed ZeRO-{self.settings['zero_optimization']['stage']}"

    def prepare(self, objective: nn.Module, optimizer: torch.optim.Adam, config: Config, lanes: int):
        """The engine and its optimizer. Raises ValueError for settings that it cannot keep (see refuse)."""
        self.refuse(config, lanes)
        batch = config.train.global_batch
        figures = {
            "train_batch_size": batch,
            "train_micro_batch_size_per_gpu": batch // world_size(),
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.train.clip_norm or 0.0,
        }
        self.settings |= figures
        # Not its own bf16, which rounds the weights, but not the buffers. No modules are named whose gradients it would average
        # in less than float32.
        bf16 = config.train.precision == "bf16"
        self.settings["torch_autocast"] = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        objective.to(memory_format=torch.contiguous_format)  # its flat tensors have no channels_last
        engine, prepared_optimizer = self.accelerator.prepare(objective, optimizer)
        taken = {
            "train_batch_size": engine.train_batch_size(),
            "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
            "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
            "gradient_clipping": engine.gradient_clipping(),
        }
        if taken != figures:
            raise ValueError(f"DeepSpeed took {taken} instead of {figures}; remove these from the file of its settings")
        return engine, prepared_optimizer

    def refuse(self, config: Config, lanes: int) -> None:
        """Raises ValueError for what cannot work, or would not mean what it does under DDP."""
        train, zero = config.train, self.settings["zero_optimization"]
        ddp = "or launch without DeepSpeed"
        if train.accumulate > 1:
            raise ValueError(
                f"train.accumulate={train.accumulate} needs gradients that stay whole on every rank, DeepSpeed's ZeRO splits "
                f"them; set train.accumulate=1, {ddp}"
            )
        if lanes % world_size():
            raise ValueError(
                f"DeepSpeed needs the same batch on every rank, but {world_size()} ranks do not divide the {lanes} lanes of the "
                f"data; change the ranks, data.lanes or train.global_batch={train.global_batch}, {ddp}"
            )
        if train.precision == "fp16":
            raise ValueError(
                f"train.precision=fp16: DeepSpeed would clip the scaled gradient, and not lower the scale after an overflow; "
                f"take train.precision=bf16, {ddp}"
            )
        if train.channels_last:
            raise ValueError(f"train.channels_last=true: DeepSpeed's flat tensors have no such layout; leave it out, {ddp}")
        if zero.get("stage") not in (1, 2):
            raise ValueError(f"zero_optimization.stage={zero.get('stage')} of DeepSpeed's settings: take 1 or 2, {ddp}")
        own = [name for name in ("fp16", "bf16") if self.settings.get(name, {}).get("enabled")]
        own += [name for name in ("optimizer", "scheduler") if name in self.settings]
        own += [name for name in ("offload_optimizer", "offload_param") if zero.get(name, {}).get("device", "none") != "none"]
        if own:
            raise ValueError(
                f"{own} in DeepSpeed's settings: the run's own configuration sets precision, optimizer and schedule, and its "
                f"state stays on the ranks' devices; remove them, {ddp}"
            )

    def autocast(self) -> AbstractContextManager:
        """The precision of a step, for a forward pass outside of one."""
        enabled = self.settings["torch_autocast"]["enabled"]
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=enabled)

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, clip_norm: float | None) -> torch.Tensor:
        """The norm of the gradient, before it was clipped: accelerator.backward has taken the step already."""
        return torch.as_tensor(model.get_global_grad_norm(), device=self.accelerator.device)

    def optimizer_state(self, objective: nn.Module, optimizer: torch.optim.Adam) -> dict:
        """The whole optimizer's state, as `load` takes it under any engine. Call on every rank."""
        from deepspeed.utils import safe_get_full_optimizer_state

        (local,) = optimizer.state.values()  # ZeRO gives the optimizer one flat tensor: this rank's part of all weights
        parameters = list(objective.parameters())
        state = {
            number: {"step": local["step"].clone()}
            | {name: safe_get_full_optimizer_state(parameter, name).cpu() for name in MOMENTS}
            for number, parameter in enumerate(parameters)
            if parameter.requires_grad
        }
        group = {**optimizer.param_groups[0], "params": list(range(len(parameters)))}
        return {"state": state, "param_groups": [group]}

    def load(self, objective: nn.Module, optimizer: torch.optim.Adam, weights: dict, state: dict) -> None:
        """Puts back weights and buffers, and the optimizer's state. Call on every rank, after `prepare`."""
        from deepspeed.utils import (
            lazy_init_hp_params_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        objective.load_state_dict(weights)
        trained = [(number, parameter) for number, parameter in enumerate(objective.parameters()) if parameter.requires_grad]
        (group,), (saved,) = optimizer.param_groups, state["param_groups"]
        group |= {name: value for name, value in saved.items() if name != "params"}
        # Adam makes its state in the first step, and DeepSpeed finds the parameters' parts of it only then.
        (split,) = group["params"]
        step = next(iter(state["state"].values()))["step"]
        optimizer.state[split] = {"step": step.clone()} | {name: torch.zeros_like(split) for name in MOMENTS}
        lazy_init_hp_params_optimizer_state([parameter for _, parameter in trained], split, optimizer.state)
        for number, parameter in trained:
            safe_set_full_fp32_param(parameter, parameter.data)  # the float32 copy that the optimizer works on
            for name in MOMENTS:
                safe_set_full_optimizer_state(parameter, state["state"][number][name].to(parameter.device), name)
