"""Names the default configuration in a user's home that `accelerate launch` reads unseen."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from eae_dist.distributed.stop import LAUNCHERS

# What accelerate assumes without a file, for the keys that choose ranks, devices or an engine. Precision, accumulation and
# compilation are not among them: there the settings of the run decide (setup.UNUSED_SETTINGS).
ASSUMED: dict[str, tuple[object, ...]] = {
    "num_processes": (None,),
    "num_machines": (1, None),
    "distributed_type": ("NO", "MULTI_GPU", "MULTI_CPU", None),
    "use_cpu": (False, None),
    "gpu_ids": ("all", None),
    "deepspeed_config": ({}, None),
    "fsdp_config": ({}, None),
    "megatron_lm_config": ({}, None),
    "parallelism_config": ({}, None),
}


def note_on_defaults(env: Mapping[str, str], launcher_command: str, file: Path) -> str | None:
    """Returns a line that names the file and what it sets, or None if the launcher is another one or was given its own file.

    launcher_command: the command line of the launcher. file: the default configuration.
    """
    if LAUNCHERS["accelerate"] not in env or "--config_file" in launcher_command or not file.is_file():
        return None
    try:
        values = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"accelerate launch reads {file}, which cannot be read ({' '.join(str(error).split())}); remove it"
    values = values if isinstance(values, dict) else {}
    named = [key for key, assumed in ASSUMED.items() if values.get(key) not in assumed]
    if not named:
        return None
    told = ", ".join(f"{key}: {values[key]}" for key in named)
    return f"accelerate launch takes settings from {file}: {told}; remove the file or give --config_file if they are not meant"
