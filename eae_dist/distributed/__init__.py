"""Distributed execution: collectives, failures on ranks, requests to stop, and launching."""

from eae_dist.distributed.collectives import (
    average_over_ranks,
    barrier,
    exchange_rows,
    from_rank_zero,
    gather_objects,
    gather_padded,
    gather_rows,
    measured_waits,
    message_device,
    rank,
    ranks_of_group,
    row_counts,
    subgroup,
    sum_over_ranks,
    world_size,
)
from eae_dist.distributed.failures import (
    RankZeroFailed,
    ending_ranks,
    on_every_rank,
    on_rank_zero,
    require_equal,
    silent_ranks,
)
from eae_dist.distributed.stop import StopRequest

__all__ = [
    "RankZeroFailed",
    "StopRequest",
    "average_over_ranks",
    "barrier",
    "ending_ranks",
    "exchange_rows",
    "from_rank_zero",
    "gather_objects",
    "gather_padded",
    "gather_rows",
    "measured_waits",
    "message_device",
    "on_every_rank",
    "on_rank_zero",
    "rank",
    "ranks_of_group",
    "require_equal",
    "row_counts",
    "silent_ranks",
    "subgroup",
    "sum_over_ranks",
    "world_size",
]
