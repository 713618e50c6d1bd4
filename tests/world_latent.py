"""The cases of tests/world.py about densities of latents; every case is called on every rank."""

import torch

from eae_dist.distributed import gather_objects, rank, world_size
from eae_dist.latent.densities import DENSITIES
from eae_dist.latent.flow import Flow
from eae_dist.latent.mixture import Mixture
from eae_dist.latent.rows import Rows
from eae_dist.latent.two_stage import TwoStage

# Of 5,000 rows in three blocks: empty ranks, ranks inside one block, a block on three ranks, a bound between two blocks.
BOUNDS = {1: [0, 5000], 2: [0, 2100, 5000], 3: [0, 4096, 4096, 5000], 4: [0, 0, 2300, 2400, 5000]}
SMALL = {
    "gmm": lambda: Mixture(4, starts=2),
    "two_stage": lambda: TwoStage(width=24, epochs=2, batch=512, learning_rate=1e-3),
    "flow": lambda: Flow(transforms=1, width=8, epochs=2, batch=512),
}


def latents() -> torch.Tensor:
    """[5000, 5] float64: four groups of unequal spread."""
    generator = torch.Generator().manual_seed(4)
    z = torch.randn(5000, 5, generator=generator, dtype=torch.float64)
    group = torch.randint(4, (5000,), generator=generator)
    centers = 6 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    return centers[group] + z * torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=torch.float64)[group][:, None]


def here(x: torch.Tensor) -> torch.Tensor:
    bounds = BOUNDS[world_size()]
    return x[bounds[rank()] : bounds[rank() + 1]]


def fitted(dtype: torch.dtype) -> dict:
    out = {}
    for name, cls in DENSITIES.items():
        density = SMALL.get(name, cls)()
        density.fit(here(latents().to(dtype)))
        out[name] = {"state": density.state_dict(), "samples": density.sample(range(50))}
    return out


def densities_in_float64() -> dict:
    return fitted(torch.float64)


def densities_in_float32() -> dict:
    return fitted(torch.float32)


def density_errors() -> dict[str, str]:
    """What is raised on this rank where the last rank alone has a latent that is not finite, and where none has any."""
    bad = latents()
    bad[-1, 0] = torch.nan
    messages = {}
    for name, x in {"not finite": bad, "none": bad[:0]}.items():
        try:
            DENSITIES["mvg"]().fit(here(x))
        except ValueError as error:
            messages[name] = str(error)
    return messages


def whole_blocks() -> list[list[int]]:
    """Of every block on every rank, in rank order: its first row, its length, and 1 if it holds the right rows."""
    x = latents()
    blocks = Rows(here(x)).numbered_blocks()
    found = [[first, len(block), int(torch.equal(block, x[first : first + len(block)]))] for first, block in blocks]
    return [block for blocks in gather_objects(found) for block in blocks]


CASES = {case.__name__: case for case in (densities_in_float64, densities_in_float32, density_errors, whole_blocks)}
