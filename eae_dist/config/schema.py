"""The settings: one dataclass per section, with the default, the bounds and the meaning of every key.

`--help` prints the docstring under each field. Fields marked `changeable` may differ when a run folder is continued.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from eae_dist.errors import UserError


def setting(
    default: Any,
    *,
    changeable: bool = False,
    choices: tuple[str, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    below: int | None = None,
    at_most: float | None = None,
) -> Any:
    """Returns a dataclass field with the bounds of its value. None is always allowed.

    changeable: True if the value may differ when a run folder is continued. `check_values` checks the other arguments.
    """
    metadata = {"changeable": changeable, "bounds": Bounds(choices, above, at_least, below, at_most)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Bounds:
    """The values that a setting may take. Numbers must always be finite."""

    choices: tuple[str, ...] = ()
    above: float | None = None
    at_least: float | None = None
    below: int | None = None
    at_most: float | None = None

    def check(self, key: str, value: Any) -> None:
        """Raises ValueError for a value outside the bounds; the message names the key and the allowed values."""
        if value is None:
            return
        if value == "":
            raise UserError(f"{key}= is empty; give a value, or leave the setting out")
        if self.choices and value not in self.choices:
            raise UserError(f"{key}={value} is unknown; it is one of {', '.join(self.choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key}={value} must be a finite number")
        if self.above is not None and self.at_most is not None:
            if not self.above < value <= self.at_most:
                raise UserError(f"{key}={value} must lie in ({self.above}, {self.at_most}]")
        elif self.at_least is not None and self.at_most is not None:
            if not self.at_least <= value <= self.at_most:
                raise UserError(f"{key}={value} must lie in [{self.at_least}, {self.at_most}]")
        elif self.above is not None and not value > self.above:
            raise UserError(f"{key}={value} must be greater than {self.above}")
        if self.at_least is not None and value < self.at_least:
            raise UserError(f"{key}={value} must be at least {self.at_least}")
        if self.below is not None and value >= self.below:
            raise UserError(f"{key}={value} must be less than 2^{self.below.bit_length() - 1}")


@dataclass
class DataConfig:
    """Where the images come from and how they are read."""

    root: str = setting("shards/mnist5k", changeable=True)
    """Folder of shards with an index.json, written by `python -m eae_dist.pack`; or the http, https, s3, gs, az or
    hf address of one."""
    split: str = "train"
    """The split to train on."""
    validation: str | None = "validation"
    """The split whose loss selects the best checkpoint and controls the plateau schedule; null: no validation."""
    lanes: int | None = setting(None, at_least=1)
    """Number of lanes. A lane is a contiguous part of the pass over the data; every batch takes the same number of images from
    each lane. It must divide train.global_batch and be at least the number of ranks. Default: train.global_batch; for remote
    shards, the largest divisor of it such that twice as many shards as lanes fit into data.cache_bytes."""
    workers: int = setting(0, at_least=0, changeable=True)
    """Processes per rank that read and decode images; with 0, a thread reads ahead."""
    prefetch: int = setting(2, at_least=1, changeable=True)
    """Batches that each worker reads ahead."""
    cache: str = setting("~/.cache/eae_dist/shards", changeable=True)
    """Folder on a local disk in which remote shards are cached; all ranks, workers and jobs on a machine share it."""
    cache_bytes: int = setting(50_000_000_000, at_least=1, changeable=True)
    """Largest size of data.cache in bytes. The default of data.lanes depends on it: to change it during a run, also set
    data.lanes to the value in the run's config.yaml."""
    retries: int = setting(5, at_least=0, changeable=True)
    """How often a failed fetch is repeated. The waits before the repeats are 1, 2, 4, ... seconds, at most 30."""
    timeout: float = setting(30.0, above=0, changeable=True)
    """A fetch fails when the server sends nothing for this many seconds."""


WHERE_DATA_LIES = ("root", "cache", "cache_bytes", "retries", "timeout")  # fields of DataConfig that may differ in an evaluation
HOW_TO_START = ("device", "timeout", "deterministic")  # fields of TrainConfig that every command takes


@dataclass
class ModelConfig:
    """The networks."""

    network: str = "small"
    """small (3 + 3 layers), rae32 (MNIST, CIFAR-10) or rae64 (CelebA). rae32 and rae64 are the networks of the RAE paper."""
    encoder: str | None = None
    """Your own encoder class, package.module:Class. It is called with the keywords image_shape (c, h, w), latent_dim, width and
    bias (whether the last layer may have a bias). It maps [b, c, h, w] in [0, 1] -> [b, latent_dim]. Its batch norms must be
    GlobalBatchNorm. Random layers (dropout) are seeded by seed, step and rank: results repeat only on the same number of
    ranks."""
    decoder: str | None = None
    """Your own decoder class, package.module:Class. It is called with the keywords image_shape, latent_dim and width. It maps
    [b, latent_dim] -> [b, c, h, w] in [0, 1]."""
    width: int | None = setting(None, at_least=1)
    """Channels of the first encoder layer. Default: that of the network."""
    latent_dim: int | None = setting(None, at_least=1)
    """Number of latent dimensions d. Default: that of the network for gray or color images. The paper advises at least 32 for
    color images."""
    norm: str = "batch"
    """batch (a batch norm after every layer except the last) or none. The latent of an EAE is batch-normed in both cases."""
    norm_momentum: float = setting(0.1, above=0, at_most=1)
    """Weight of a new batch in the running statistics of the batch norms. The Keras layers of the RAE paper use 0.01."""
    norm_eps: float = setting(1e-3, above=0)
    """Constant added to the variance in the batch norms of the networks (the default of Keras). The latent norm adds 1e-5."""


@dataclass
class ObjectiveConfig:
    """The loss: one row of the table in the paper, or a rival beyond it."""

    name: str = "eae"
    """vae, cv_vae, wae, two_stage_vae, rae, rae_l2, rae_gp, rae_sn, ae, ae_l2, eae, eae_linear, or beyond the paper sigreg and
    swae. A setting of this section that the objective does not read must keep its default."""
    reconstruction_weight: float | None = setting(None, above=0)
    """Weight of the squared error, which is summed per image. Default: 1/(pixels channels); for vae, cv_vae and two_stage_vae:
    1/channels."""
    entropy_weight: float = 0.01
    """eae, eae_linear: weight w in the loss (squared error per pixel and channel) - w (entropy in nats per latent dimension)."""
    k: int = setting(1, at_least=1)
    """eae, eae_linear: the entropy is estimated from the distance to the k-th nearest neighbor. The paper uses 1."""
    average_k: bool = False
    """eae, eae_linear: use the mean of the first k log distances instead of only the k-th. The gradient is then less noisy."""
    eps2: float = setting(1e-4, above=0)
    """eae, eae_linear: constant added to squared neighbor distances inside the logarithm. Latents have unit variance."""
    group: str | None = None
    """eae, eae_linear: compute the entropy within groups of ranks and use the mean over groups, if there are too many latents to
    compare all of them. node (the ranks of one machine) or a number of ranks. Default: one group of all ranks; the entropy then
    does not depend on the number of ranks."""
    map: str = setting("fixed", choices=("fixed", "redrawn"))
    """eae_linear: the orthonormal map is fixed (drawn once from the seed) or redrawn (in each step, from seed and step)."""
    map_dim: int | None = setting(None, at_least=1)
    """eae_linear: number of dimensions of the mapped latent, at most latent_dim. Default: latent_dim."""
    kl_weight: float = setting(0.312, at_least=0)
    """vae, cv_vae, two_stage_vae: weight of the divergence from N(0, I), in nats summed over dimensions."""
    sigma: float = setting(0.7, above=0)
    """cv_vae: the fixed standard deviation of the posterior."""
    mmd_weight: float = setting(0.03, at_least=0)
    """wae: weight of the squared maximum mean discrepancy from N(0, I)."""
    input_noise: float = setting(0.0, at_least=0)
    """wae: standard deviation of the Gaussian noise added to the encoder input in training. The noise is clipped to one standard
    deviation."""
    latent_weight: float = setting(1e-4, at_least=0)
    """rae, rae_l2, rae_gp, rae_sn: weight of the mean square of the latent entries."""
    decoder_weight: float = setting(1e-7, at_least=0)
    """rae_l2, ae_l2: weight of the sum of squares of the decoder kernels."""
    gradient_weight: float = setting(5e-8, at_least=0)
    """rae_gp: weight of the mean square of the entries of d sum ||D(z)||^2 / dz."""
    sigreg_weight: float = setting(0.1, at_least=0)
    """sigreg: weight of the Epps-Pulley statistic of the latents' projections, without the factor n of LeJEPA."""
    wasserstein_weight: float = setting(0.01, at_least=0)
    """swae: weight of the squared sliced Wasserstein-2 distance from N(0, I)."""
    directions: int = setting(256, at_least=1)
    """sigreg, swae: number of random directions on which a batch is projected; each step draws others."""


@dataclass
class TrainConfig:
    """The training run."""

    output: str = setting("runs/mnist5k-eae", changeable=True)
    """Run folder: it holds config.yaml, metrics.jsonl, samples, checkpoints and evaluation. Starting again with the same folder
    continues the run."""
    seed: int = setting(0, at_least=0, below=2**63)
    """Fixes the initial weights, the order of the data and every random draw."""
    epochs: float = setting(40.0, above=0, changeable=True)
    """Length of the run, in passes over the training split."""
    global_batch: int = setting(128, at_least=1)
    """Images per step, over all ranks. The entropy and the batch norms are computed over this batch."""
    accumulate: int = setting(1, at_least=1)
    """Micro-batches per step. More than 1 saves memory and costs a second pass through the encoder. Latent norm, entropy and MMD
    remain exactly those of global_batch images; the batch norms inside the networks see global_batch / accumulate images."""
    blocks: int = setting(0, at_least=0)
    """With a power of two V, the run has the same bits on 1, 2, 4, ... or V ranks: weights, losses and metrics, on processors or
    GPUs of one kind with the same versions of the libraries. The batch is cut into V blocks of rows, and all sums over rows are
    added in one order. On CPUs each rank then computes with one thread. At most data.lanes. 0: off; ranks differ by rounding."""
    optimizer: str = setting("adam", choices=("adam", "adamw"))
    """adam, or adamw (Adam with weight_decay)."""
    weight_decay: float = setting(0.01, at_least=0)
    """adamw: each step multiplies all weights by 1 - weight_decay times the learning rate."""
    fused: bool = False
    """Take the step of the optimizer in one kernel of torch, which is faster. On a CPU its last bits depend on the sizes of the
    tensors, so it is refused under DeepSpeed, which would round in another way."""
    learning_rate: float = setting(8e-3, above=0)
    """Largest learning rate of the optimizer, from which the schedule starts."""
    warmup_epochs: float = setting(0.0, at_least=0)
    """Epochs, or a part of one, in which the learning rate rises linearly to what the schedule says; less than train.epochs."""
    schedule: str = setting("exponential", choices=("exponential", "cosine", "plateau", "constant"))
    """exponential (times decay after every epoch), cosine (half a wave from the end of the warm-up to the end of the run),
    plateau (times plateau_factor when the validation loss stops improving) or constant."""
    cosine_factor: float = setting(0.0, at_least=0, at_most=1)
    """Factor of the cosine schedule at the end of the run. With another train.epochs a run continues on the new curve."""
    decay: float = setting(0.98, above=0, at_most=1)
    """Factor per epoch of the exponential schedule; the paper advises at least 0.98."""
    plateau_factor: float = setting(0.5, above=0, at_most=1)
    """Factor of the plateau schedule."""
    plateau_patience: int = setting(5, at_least=1)
    """The plateau schedule lowers the rate after this many validations in a row without improvement. It starts after the
    warm-up."""
    clip_norm: float | None = setting(None, above=0)
    """Largest norm of the gradient; a longer gradient is scaled down to this norm. Default: no clipping."""
    ema: float | None = setting(None, above=0, at_most=1)
    """Judge exponential moving averages of the weights, of which each step keeps this part, such as 0.999; less in the first
    steps. Validation, samples and evaluation use the averages, which checkpoints hold beside the weights. Batch norms keep the
    running statistics of training. Default: no averages."""
    precision: str = setting("fp32", choices=("fp32", "bf16", "fp16"), changeable=True)
    """fp32, bf16 or fp16 (GPU only). Entropy, latent statistics and losses are always computed in float32."""
    tf32: bool = setting(False, changeable=True)
    """On GPUs, round the factors of float32 products and convolutions to 10 bits, which is faster. The entropy and the other
    losses are still computed in float32."""
    compile: bool = setting(False, changeable=True)
    """Compile the networks with torch.compile, which needs a C++ compiler. The decoder of rae_gp is not compiled, because it is
    differentiated twice."""
    channels_last: bool | None = setting(None, changeable=True)
    """Store convolution weights in the channels_last memory format, which is faster. Default: true, but false under DeepSpeed,
    which does not support it."""
    checkpoint_activations: bool = setting(False, changeable=True)
    """Save memory: keep one activation per layer instead of two, and recompute the batch norm in the backward pass. The results
    have the same bits."""
    deterministic: bool = setting(False, changeable=True)
    """Use deterministic GPU kernels: an interrupted run then ends with the same bits as an uninterrupted one. On a CPU this
    always holds."""
    device: str = setting("auto", choices=("auto", "cpu"), changeable=True)
    """auto (GPUs if torch sees any, else the CPU) or cpu."""
    timeout: float = setting(600.0, above=0, below=2**31, changeable=True)
    """A rank that waits for another rank fails after this many seconds."""
    validation_images: int = setting(10_000, at_least=1)
    """Largest number of validation images; the entropy compares each of them with every other."""
    validate_every: int | None = setting(None, at_least=1)
    """Number of images between validations. Default: one epoch."""
    sample_every: int | None = setting(None, at_least=1, changeable=True)
    """Number of images between grids of samples, reconstructions and interpolations. Default: one epoch."""
    save_every: int | None = setting(None, at_least=1, changeable=True)
    """Number of images between checkpoints. Default: one epoch."""
    log_every: int | None = setting(None, at_least=1, changeable=True)
    """Number of images between lines in metrics.jsonl. Default: ten steps."""
    profile: int = setting(0, at_least=0, changeable=True)
    """Number of steps to profile after the first three steps of this start. Every rank writes a trace into RUN/profile; view it
    at https://ui.perfetto.dev."""
    keep: int = setting(3, at_least=1, changeable=True)
    """Number of most recent checkpoints to keep, in addition to the best one."""
    trackers: list[str] = setting(["tensorboard"], changeable=True)
    """Names of the accelerate trackers that receive the metrics in addition to metrics.jsonl."""


@dataclass
class EvaluateConfig:
    """Evaluation of a checkpoint."""

    split: str = setting("test", changeable=True)
    """The split that is reconstructed and interpolated."""
    reference: str = setting("test", changeable=True)
    """The split that generated and reconstructed images are compared with."""
    densities: list[str] = setting([], changeable=True)
    """Densities that are fitted to the training latents and sampled: isotropic, mvg, gmm, two_stage, flow (needs the package
    zuko). Default: isotropic, mvg and gmm; for two_stage_vae: two_stage."""
    components: int = setting(10, at_least=1, changeable=True)
    """Number of components of gmm."""
    second_stage_weight: float = setting(1.5e-3, above=0, changeable=True)
    """Weight of the divergence in the second stage of two_stage. The official values are 1.5e-3 for MNIST, 1e-3 for CIFAR-10
    and 2e-3 for CelebA."""
    second_stage_epochs: int = setting(100, at_least=1, changeable=True)
    """Passes over the training latents in the second stage of two_stage. The default is the official value."""
    features: str | None = setting(None, changeable=True)
    """The network whose features are compared: inception (the distance is fid), dinov2_vits14, dinov2_vitl14 (need the package
    timm), efflite0 (images at 128 x 128), efflite0_64px (at 64 x 64) or your own package.module:function, given on the command
    line. Default: efflite0_64px for images of up to 64 pixels, else efflite0."""
    preprocessing: str | None = setting(None, changeable=True)
    """Preprocessing of images for inception: pytorch-fid (default), tf1 or clean; for dinov2_*: dgm-eval (default) or tf1."""
    weights: str | None = setting(None, changeable=True)
    """File with the weights of inception, dinov2_vits14 or dinov2_vitl14. Default: its place in the cache of torch.hub."""
    frechet: str = setting("svd", choices=("svd", "sqrtm"), changeable=True)
    """Method for the matrix square root in the Fréchet distance: svd, or sqrtm as in pytorch-fid."""
    read: str = setting("pack", choices=("pack", "pytorch-fid"), changeable=True)
    """How image files are read (--images): pack applies the EXIF orientation and composes transparency on white; pytorch-fid
    ignores both."""
    resize: int | None = setting(None, at_least=1, changeable=True)
    """The central square of every image file (--images) is resized to resize x resize pixels. Default: all images of a folder
    must have one size."""
    neighbor_images: int = setting(10_000, at_least=2, changeable=True)
    """Largest number of images per set for the kernel distance, precision, recall, density and coverage; the last four need at
    least 6 images. It is also the largest number of latents that are compared with N(0, I)."""
    cache: str = setting("~/.cache/eae_dist", changeable=True)
    """Folder in which the statistics of reference images are cached."""
    batch: int = setting(256, at_least=1, changeable=True)
    """Images per forward pass on each rank."""
    count: int | None = setting(None, at_least=1, changeable=True)
    """Number of images taken from the start of the split and of the reference, and number of samples drawn. Default: all images
    of the split."""
    seed: int = setting(0, at_least=0, below=2**63, changeable=True)
    """Fixes the drawn samples, the pairs of images for mid-points, the starting points of gmm and the training of two_stage and
    flow."""


@dataclass
class IndexConfig:
    """Nearest-neighbor search in the latents of a data set."""

    kind: str = setting("auto", choices=("auto", "flat", "ivf_flat", "ivf_pq", "hnsw"), changeable=True)
    """flat (exact), ivf_flat, ivf_pq (for more latents than fit into memory), hnsw (fastest for single queries, slow to build) or
    auto. auto selects one of the first three by number of latents, memory and recall."""
    recall: float = setting(0.95, above=0, at_most=1, changeable=True)
    """The fraction of the ten nearest neighbors that the index should find. With 1, flat finds all of them."""
    metric: str = setting("l2", choices=("l2", "cosine", "inner_product"), changeable=True)
    """What is compared: distances (l2), distances of rows that are divided by their norms (cosine), or inner products."""
    memory: int | None = setting(None, at_least=1, changeable=True)
    """Memory that auto may use per rank, in bytes. Default: half of the memory of the machine, divided by the ranks on it."""
    split: str = setting("train", changeable=True)
    """The split whose latents are searched."""
    query_split: str = setting("test", changeable=True)
    """The split whose images are the queries."""
    k: int = setting(5, at_least=1, changeable=True)
    """Number of neighbors that are shown and that vote on a label."""
    density: str = setting("isotropic", changeable=True)
    """The density from which samples are drawn as queries. A density other than isotropic must have been fitted by evaluate."""
    samples: int = setting(10_000, at_least=1, changeable=True)
    """Number of samples to draw, at most the number of query images."""
    duplicate_ratio: float = setting(0.1, above=0, changeable=True)
    """Two images of the split are near-duplicates if the distance of their latents is below this fraction of the median distance
    to a neighbor."""
    seed: int = setting(0, at_least=0, below=2**63, changeable=True)
    """Fixes the drawn samples and the rows on which an index is trained."""


@dataclass
class Config:
    """All sections."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    index: IndexConfig = field(default_factory=IndexConfig)


def check_values(config: Config) -> None:
    """Raises ValueError for a value outside its bounds and for settings that contradict each other for any data."""
    for section in fields(Config):
        settings = getattr(config, section.name)
        for key in fields(settings):
            bounds: Bounds = key.metadata.get("bounds", Bounds())
            bounds.check(f"{section.name}.{key.name}", getattr(settings, key.name))
    train, objective = config.train, config.objective
    if train.schedule == "plateau" and config.data.validation is None:
        raise UserError("train.schedule=plateau follows the validation loss; set data.validation")
    if train.warmup_epochs >= train.epochs:
        raise UserError(f"train.warmup_epochs={train.warmup_epochs:g} must be less than train.epochs={train.epochs:g}")
    if train.optimizer == "adam" and train.weight_decay != TrainConfig.weight_decay:
        raise UserError(
            f"train.weight_decay={train.weight_decay} has no effect with train.optimizer=adam; set train.optimizer=adamw, or "
            f"leave it out"
        )
    if train.compile and train.checkpoint_activations:
        raise UserError(
            "train.compile=true: compiled networks cannot be recomputed in backward; set train.checkpoint_activations=false"
        )
    if objective.name == "wae" and train.global_batch < 2:
        raise UserError(f"objective.name=wae compares pairs of rows; train.global_batch={train.global_batch} must be at least 2")
    if train.blocks & (train.blocks - 1):
        raise UserError(f"train.blocks={train.blocks} must be 0 or a power of two")
    if train.blocks and train.compile:
        raise UserError("train.compile=true: compiled networks cannot run block by block; set train.blocks=0")
    if train.blocks and objective.group is not None:
        raise UserError(
            f"objective.group={objective.group}: the entropy of groups depends on the number of ranks; set train.blocks=0"
        )
    # Every row needs k other rows. Objectives without an entropy reject objective.k elsewhere.
    if objective.k >= train.global_batch and (objective.name.startswith("eae") or objective.k > 1):
        raise UserError(f"objective.k={objective.k} needs more than {objective.k} rows, train.global_batch={train.global_batch}")
