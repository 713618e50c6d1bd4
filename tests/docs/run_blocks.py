"""Runs scripts one after the other on this rank, each in a namespace of its own: `run_blocks.py PORT SCRIPT [PORT SCRIPT ...]`.

On several ranks each script has a port of its own to meet at, because a store must not outlive the script that opened it.
"""

import os
import runpy
import sys

import torch.distributed as dist
from accelerate.state import AcceleratorState

for port, script in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    print(f"running {script}", flush=True)
    os.environ["MASTER_PORT"] = port
    runpy.run_path(script, run_name="__main__")
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
