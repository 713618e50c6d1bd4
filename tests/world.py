"""The cases that need several ranks, run once per world size: torchrun tests/world.py OUT SHARDS FOLDER FID_CASE.

A case is a function of no argument; what it returns on rank 0 (tensors, numbers, lists, dicts) is saved under its name for
the tests to compare across world sizes. Every case must be called on every rank.
"""

import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from run_folders import bits_of
from world_cases import (
    ACCUMULATED,
    BATCH,
    BLOCKS,
    COMPUTED_TWICE,
    CONTINUED,
    FLOAT32,
    IN_BLOCKS,
    INTERRUPTED,
    OBJECTIVES,
    OF_THREE,
    STEPS,
    configured,
    entropy_inputs,
)
from world_latent import CASES as LATENT_CASES
from world_metrics import CASES as METRIC_CASES
from world_search import CASES as SEARCH_CASES

from eae_dist.data.image_folders import walk_images
from eae_dist.data.stream import ShardStream
from eae_dist.distributed import (
    RankZeroFailed,
    StopRequest,
    barrier,
    gather_objects,
    gather_rows,
    rank,
    subgroup,
    sum_over_ranks,
    world_size,
)
from eae_dist.evaluate import evaluate, reconstructed
from eae_dist.inference.trained_model import decoded
from eae_dist.losses.entropy import entropy_terms, gaussian_reference, knn_entropy
from eae_dist.metrics.frechet import ROOTS, frechet_distance
from eae_dist.metrics.image_sets import describe
from eae_dist.metrics.inception import INCEPTION_FILE, inception
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.numerics.keyed_random import derive_key
from eae_dist.objectives import build_objective
from eae_dist.training import checkpoint as checkpoints
from eae_dist.training.compilation import set_execution
from eae_dist.training.loop import train, training_step, warm_up_ddp_buckets
from eae_dist.training.setup import check_micro_batches
from eae_dist.training.validation import validate

OUT, SHARDS, FOLDER, FID_CASE = (Path(argument) for argument in sys.argv[1:5])
CASES = LATENT_CASES | METRIC_CASES


def case(function):
    CASES[function.__name__] = function
    return function


def run_steps(name: str, steps: int, *settings: str, workers: int = 0):
    """Losses [steps, terms], and weights and buffers after `steps` steps, through the pieces that train() is made of."""
    config = configured(SHARDS, name, *settings)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    stream = ShardStream(SHARDS, "train", BATCH, seed=3, workers=workers)
    objective = build_objective(config.model, config.objective, stream.index.image_shape, config.train.seed)
    set_execution(objective, config.train, accelerator.device)
    model, optimizer = accelerator.prepare(objective, torch.optim.Adam(objective.parameters(), lr=1e-2))
    check_micro_batches(stream, config.train.accumulate, accelerator.device)
    if config.train.accumulate == 1:
        warm_up_ddp_buckets(accelerator, model, stream)
    losses, gradients, batches = [], None, iter(stream)
    for step in range(steps):
        _, terms = training_step(accelerator, model, optimizer, next(batches), stream.row_ids, derive_key(3, step), config.train)
        losses.append(terms)
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in objective.named_parameters()}
    batches.close()
    state = {key: value.clone() for key, value in objective.state_dict().items()}
    with StopRequest(config.train.timeout) as stop:
        validation = validate(accelerator, objective, config, stop)
    assert all(torch.equal(state[key], value) for key, value in objective.state_dict().items()), "validation changed the state"
    losses = gather_rows(torch.stack(losses)[None]).mean(0)
    return {"losses": losses, "gradients": gradients, "state": state, "validation": validation}


@case
def training_in_float64():
    torch.set_default_dtype(torch.float64)
    try:
        return {name: run_steps(name, STEPS) for name in (OF_THREE if world_size() == 3 else OBJECTIVES)} | {
            "clipped": run_steps("eae", STEPS, "train.clip_norm=0.05"),
            "average_k": run_steps("eae", STEPS, "objective.k=3", "objective.average_k=true"),
        }
    finally:
        torch.set_default_dtype(torch.float32)


@case
def training_in_float32():
    return {name: run_steps(name, STEPS) for name in FLOAT32}


@case
def training_with_two_workers():
    return run_steps("eae", 3, workers=2)


@case
def training_with_accumulation():
    """One step of every row in two micro-batches; and without norms in the networks in as many as make four with the ranks."""
    torch.set_default_dtype(torch.float64)
    try:
        return {
            "two": {name: run_steps(name, 1, "train.accumulate=2") for name in OBJECTIVES},
            "four with the ranks": {
                name: run_steps(name, 3, "model.norm=none", f"train.accumulate={-(-4 // world_size())}") for name in ACCUMULATED
            },
        }
    finally:
        torch.set_default_dtype(torch.float32)


@case
def training_with_activations_computed_twice():
    """Of every row two steps, and of some one in two parts, each without and with checkpointed activations."""
    torch.set_default_dtype(torch.float64)
    try:
        return {
            (name, parts): [
                run_steps(name, 3 - parts, f"train.accumulate={parts}", f"train.checkpoint_activations={on}")
                for on in ("false", "true")
            ]
            for name, parts in (COMPUTED_TWICE if world_size() < 3 else ())
        }
    finally:
        torch.set_default_dtype(torch.float32)


def uneven(x: torch.Tensor) -> torch.Tensor:
    """This rank's rows of x: none on rank 1 of several, all that is left on the last."""
    bounds = {1: [0, 40], 2: [0, 29, 40], 3: [0, 13, 13, 40], 4: [0, 7, 7, 30, 40]}[world_size()]
    return x[bounds[rank()] : bounds[rank() + 1]]


@case
def entropy():
    """Entropy, its floored pairs and its gradient with respect to all 40 rows, for several options, from uneven ranks."""
    out = {}
    for name, options in {
        "k=1": {"k": 1},
        "k=3": {"k": 3},
        "mean of 5": {"k": 5, "average_k": True},
        "masked": {"k": 2, "masked": True},
    }.items():
        masked = options.pop("masked", False)
        z, valid = entropy_inputs()
        local = uneven(z).clone().requires_grad_()
        terms = entropy_terms(local, valid=uneven(valid) if masked else None, **options)
        (3 * terms.entropy / world_size()).backward()  # DDP's mean over ranks; 3 is some upstream factor
        out[name] = {
            "entropy": sum_over_ranks(terms.entropy.detach()) / world_size(),
            "floored": sum_over_ranks(terms.floored),
            "gradient": gather_rows(local.grad),
        }
    return out


@case
def entropy_of_groups():
    """The mean of the entropies of two groups of ranks, and its gradient, from uneven ranks; of all ranks where they are odd."""
    ranks = world_size() // 2 if world_size() % 2 == 0 else world_size()
    local = uneven(entropy_inputs()[0]).clone().requires_grad_()
    share = knn_entropy(local, group=subgroup(ranks, 600.0))
    (share / world_size()).backward()
    return {"entropy": sum_over_ranks(share.detach()) / world_size(), "gradient": gather_rows(local.grad)}


@case
def entropy_under_autocast():
    z = entropy_inputs()[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        share = knn_entropy(uneven(z))
    return {"entropy": sum_over_ranks(share) / world_size(), "dtype": str(share.dtype)}


@case
def gaussian_reference_of_64_draws():
    return gaussian_reference(64, 5, k=1, average_k=False, eps2=1e-4, seed=0)


@case
def batch_norm():
    """Output, running statistics and first and second derivatives of GlobalBatchNorm over 40 rows from uneven ranks."""
    out = {}
    for name, shape in {"2-d": (40, 3), "4-d": (40, 3, 4, 5)}.items():
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 7
        weights = torch.randn(shape, generator=generator, dtype=torch.float64)
        norm = GlobalBatchNorm(3).double()
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, -2.0, 1.5]))
        local = uneven(x).clone().requires_grad_()
        y = norm(local)
        loss = (y.sin() * uneven(weights)).sum()
        gx, gw, gb = torch.autograd.grad(loss, [local, norm.weight, norm.bias], create_graph=True)
        (ggx,) = torch.autograd.grad(gx.square().sum(), local)
        out[name] = {
            "y": gather_rows(y.detach()),
            "gx": gather_rows(gx.detach()),
            "gw": sum_over_ranks(gw.detach()),
            "gb": sum_over_ranks(gb.detach()),
            "ggx": gather_rows(ggx),
            "running_mean": norm.running_mean,
            "running_var": norm.running_var,
        }
    return out


@case
def gathered_gradient():
    """Gradient of a mean over ranks of losses that each use all gathered rows."""
    x = torch.arange(80, dtype=torch.float64).reshape(40, 2).sin()
    local = uneven(x).clone().requires_grad_()
    everyone = gather_rows(local)
    loss = (everyone.square().sum() * everyone.sin().sum()) / world_size()
    (gradient,) = torch.autograd.grad(loss, local)
    return {"rows": everyone.detach(), "gradient": gather_rows(gradient)}


def train_settings(run: str, *settings: str, name: str = "eae"):
    return configured(
        SHARDS,
        name,
        f"train.output={FOLDER / run}",
        "train.seed=5",
        "train.save_every=130",  # images: every 5 steps
        "train.validate_every=200",
        "train.sample_every=1000",
        *settings,
    )


def epochs(steps: int) -> str:
    return f"train.epochs={steps * BATCH / 150}"


def weights_of(run: str, step: int) -> dict:
    from safetensors.torch import load_file

    return load_file(FOLDER / run / "checkpoints" / f"step-{step:08d}" / "model.safetensors")


@case
def every_row_interrupted():
    """For every row the weights after 4 steps at once, and after the last 2 of them again, from the checkpoint between.

    And the steps from which both began. The second time it also draws pictures after the third step, which must not show.
    """
    found, read = {}, ShardStream.__iter__

    def noted(stream):
        starts.append(stream.start_step)
        return read(stream)

    ShardStream.__iter__ = noted
    for name in INTERRUPTED[world_size()]:
        run, weights, starts = f"{name}-{world_size()}", [], []
        for steps in (4, 3):
            every = f"train.save_every={2 * BATCH}", f"train.sample_every={steps * BATCH}"
            train(train_settings(run, epochs(4), *every, name=name))
            weights.append(weights_of(run, 4))
            barrier()
            if rank() == 0:  # as if it had been killed before the end
                folder = FOLDER / run / "checkpoints"
                shutil.rmtree(folder / "step-00000004")
                (folder / "best").unlink()
                (folder / "latest").unlink()
                (folder / "latest").symlink_to("step-00000002")
            barrier()
        found[name] = weights, starts
    ShardStream.__iter__ = read
    return found


@case
def runs_of_two_ranks_continued():
    """The weights of runs that two ranks took to step 6 and this many continued to step 12."""
    found = {}
    for name in CONTINUED:
        halfway, run = f"halfway-{name}", f"continued-{name}-{world_size()}"
        if world_size() == 2:
            train(train_settings(halfway, epochs(6), name=name))
        if rank() == 0:
            shutil.copytree(FOLDER / halfway, FOLDER / run, symlinks=True)
        barrier()
        train(train_settings(run, epochs(12), name=name))
        found[name] = weights_of(run, 12)
    return found


@case
def runs_in_blocks():
    """The bits of runs of six steps with a validation after each three; three ranks cannot share the blocks."""
    if world_size() == 3:
        return {}
    every = f"train.validate_every={3 * BATCH}", f"train.log_every={BATCH}", f"train.save_every={6 * BATCH}"
    found = {}
    for case_name, (name, *settings) in IN_BLOCKS.items():
        run = f"blocks-{case_name}-{world_size()}"
        train(train_settings(run, epochs(6), f"train.blocks={BLOCKS}", *every, *settings, name=name))
        found[case_name] = bits_of(FOLDER / run)
    return found


@case
def runs_in_blocks_of_two_ranks_continued():
    """The bits of runs that two ranks took to step 3 and this many continued to step 6, as in `runs_in_blocks`."""
    if world_size() == 3:
        return {}
    every = f"train.validate_every={3 * BATCH}", f"train.log_every={BATCH}", f"train.save_every={3 * BATCH}"
    found = {}
    for name in CONTINUED:
        halfway, run = f"blocks-halfway-{name}", f"blocks-continued-{name}-{world_size()}"
        if world_size() == 2:
            train(train_settings(halfway, epochs(3), f"train.blocks={BLOCKS}", *every, name=name))
        if rank() == 0:
            shutil.copytree(FOLDER / halfway, FOLDER / run, symlinks=True)
        barrier()
        train(train_settings(run, epochs(6), f"train.blocks={BLOCKS}", *every, name=name))
        found[name] = bits_of(FOLDER / run)
    return found


@case
def evaluation():
    """Everything but the place of the checkpoint and of the pictures."""
    metrics = evaluate(
        FOLDER / "continued-eae-2",
        ["evaluate.batch=8", f"evaluate.cache={FOLDER}/cache-{world_size()}"],
        FOLDER / f"evaluation-{world_size()}",
    )
    names = (
        "images",
        "reconstruction",
        "reconstruction_per_pixel",
        "psnr",
        "ssim",
        "step",
        "latents",
        "sets",
        "densities",
        "warnings",
        "reference_images",
    )
    return {key: metrics[key] for key in names}


@case
def evaluation_of_every_row():
    """Errors, latents and decoded draws of each row's first weights, and all numbers of the one that has a second stage."""
    found, shape, cpu = {}, (1, 16, 16), torch.device("cpu")
    for name in OBJECTIVES:
        config = configured(SHARDS, name, "evaluate.batch=8", "evaluate.second_stage_epochs=1")
        objective = build_objective(config.model, config.objective, shape, 0).eval()
        with torch.no_grad():
            for parameter in objective.parameters():  # as they are drawn all images come out alike
                parameter.mul_(2)
        errors, similarities, latents = reconstructed(objective.autoencoder, config, cpu)
        drawn = decoded(objective.autoencoder, lambda numbers, z=latents: z[numbers], len(latents), 8, cpu, name)
        images = gather_rows(torch.cat([torch.zeros(0, *shape, dtype=torch.uint8), *(block for _, block in drawn)]))
        found[name] = {"errors": errors, "similarities": similarities, "latents": latents, "images": images}
        if name == "two_stage_vae":
            run = FOLDER / f"second-stage-{world_size()}"
            if rank() == 0:
                checkpoints.save(run, config, objective.state_dict(), {}, {"step": 1, "image_shape": list(shape)})
            barrier()
            found[name]["sets"] = evaluate(run, [])["sets"]
    return found


@case
def distance_of_two_folders():
    """By the first layers of Inception, which take a tenth of the time of all."""
    if world_size() == 3:
        return {}
    extractor = inception(FID_CASE / "hub" / "checkpoints" / INCEPTION_FILE, dimensions=64)
    a, b = (
        describe(walk_images(FID_CASE / name, 12, rule="pytorch-fid").images, extractor, 12, 10, torch.device("cpu"), name).stats
        for name in ("a", "b")
    )
    return {root: frechet_distance(a, b, root) for root in ROOTS}


@case
def disk_that_is_full_at_the_second_checkpoint():
    """What each rank raises, and the step that a reader finds afterwards."""
    save, run = checkpoints.save, f"full-{world_size()}"

    def limited(run, config, model_state, optimizer_state, state):
        if state["step"] > 2:
            raise OSError("No space left on device")
        return save(run, config, model_state, optimizer_state, state)

    checkpoints.save = limited  # called by the first rank alone
    try:
        train(train_settings(run, epochs(6), f"train.save_every={2 * BATCH}"))
    except (OSError, RankZeroFailed) as error:
        every = gather_objects((type(error).__name__, str(error)))
        return every, checkpoints.open_checkpoint(FOLDER / run).state["step"]
    finally:
        checkpoints.save = save


def main() -> None:
    Accelerator(cpu=True)  # makes the process group
    results = {}
    for name, function in (CASES | SEARCH_CASES).items():  # the last of a run that an earlier case trains
        started = time.perf_counter()
        results[name] = function()
        if rank() == 0:
            print(f"case {name}: {time.perf_counter() - started:.1f} s", flush=True)
    if rank() == 0:
        torch.save(results, OUT)


if __name__ == "__main__":
    main()
