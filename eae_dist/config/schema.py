"""The settings: a dataclass a section, with the default, the bounds and the meaning of every key beside it.

The docstring under a field is what `--help` prints. Fields marked `changeable` may differ when a run folder is continued.
"""

import math
from dataclasses import dataclass, field, fields


def setting(
    default,
    *,
    changeable: bool = False,
    choices: tuple[str, ...] = (),
    above: float | None = None,
    at_least: float | None = None,
    below: int | None = None,
    at_most: float | None = None,
):
    """A dataclass field with the values that it may take; None always may where it is the default.

    changeable: whether it may differ when a run folder is continued. `check_value` holds values to the rest.
    """
    metadata = {"changeable": changeable, "bounds": Bounds(choices, above, at_least, below, at_most)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Bounds:
    """The values that a setting may take. Numbers must be finite in any case."""

    choices: tuple[str, ...] = ()
    above: float | None = None
    at_least: float | None = None
    below: int | None = None
    at_most: float | None = None

    def check(self, key: str, value) -> None:
        """Raises ValueError that names the key and what it may be."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise ValueError(f"{key}={value} is unknown; it is one of {', '.join(self.choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value} must be a finite number")
        if self.above is not None and self.at_most is not None:
            if not self.above < value <= self.at_most:
                raise ValueError(f"{key}={value} must lie in ({self.above}, {self.at_most}]")
        elif self.above is not None and not value > self.above:
            raise ValueError(f"{key}={value} must be greater than {self.above}")
        if self.at_least is not None and value < self.at_least:
            raise ValueError(f"{key}={value} must be at least {self.at_least}")
        if self.below is not None and value >= self.below:
            raise ValueError(f"{key}={value} must be less than 2^{self.below.bit_length() - 1}")


@dataclass
class DataConfig:
    """Where the images come from and how they are read."""

    root: str = setting("shards/mnist5k", changeable=True)
    """Folder of shards with an index.json, as `python -m eae_dist.pack` writes it; or its http, https or s3 address."""
    split: str = "train"
    """The split to train on."""
    validation: str | None = "validation"
    """The split whose loss chooses the best checkpoint and steers a plateau schedule; null: none."""
    lanes: int | None = setting(None, at_least=1)
    """Into how many runs a pass is cut; divides train.global_batch, bounds the number of ranks. Default: train.global_batch; for
    remote shards the largest divisor of it such that twice as many shards as lanes fit into data.cache_bytes."""
    workers: int = setting(0, at_least=0, changeable=True)
    """Processes that read and decode, per rank; 0 reads ahead in a thread."""
    prefetch: int = setting(2, at_least=1, changeable=True)
    """Batches read ahead, per worker."""
    cache: str = setting("~/.cache/eae_dist/shards", changeable=True)
    """Folder on a local disk in which remote shards are kept; ranks, workers and jobs of a machine share it."""
    cache_bytes: int = setting(50_000_000_000, at_least=1, changeable=True)
    """At most this many bytes are kept there. Another value makes other lanes: to change it in a run, also set data.lanes to
    what the run's config.yaml says."""
    retries: int = setting(5, at_least=0, changeable=True)
    """How often a failed fetch is tried again, after 1 second, then 2, 4, ..., at most 30."""
    timeout: float = setting(30.0, above=0, changeable=True)
    """Seconds without a byte from a server after which a fetch has failed."""


WHERE_DATA_LIES = ("root", "cache", "cache_bytes", "retries", "timeout")  # of DataConfig; a judged model may be given others


@dataclass
class ModelConfig:
    """The networks."""

    network: str = "small"
    """small (3 + 3 layers), rae32 (MNIST, CIFAR-10) or rae64 (CelebA), the last two as in the RAE paper."""
    encoder: str | None = None
    """An encoder of your own, package.module:Class, called with image_shape (c, h, w), latent_dim, width and bias (whether the
    last layer may have one) by keyword: [b, c, h, w] in [0, 1] -> [b, latent_dim]; batch norms are GlobalBatchNorm.
    Its random layers (dropout) are seeded by seed, step and rank: the same bits on the same number of ranks only."""
    decoder: str | None = None
    """A decoder of your own, package.module:Class, called with image_shape, latent_dim and width by keyword:
    [b, latent_dim] -> [b, c, h, w] in [0, 1]."""
    width: int | None = setting(None, at_least=1)
    """Channels of the first encoder layer. Default: the network's own."""
    latent_dim: int | None = setting(None, at_least=1)
    """Latent dimensions d. Default: the network's own for gray or color images; the paper advises at least 32 for color."""
    norm: str = "batch"
    """batch (a batch norm after every layer but the last) or none; an EAE's latent is batch-normed in either case."""
    norm_momentum: float = setting(0.1, above=0, at_most=1)
    """Weight of a new batch in the batch norms' running statistics. The RAE paper's Keras layers: 0.01."""
    norm_eps: float = setting(1e-3, above=0)
    """Added to the variance in the networks' batch norms (Keras' default; the latent's own norm adds 1e-5)."""


@dataclass
class ObjectiveConfig:
    """The loss: one row of the paper's table."""

    name: str = "eae"
    """vae, cv_vae, wae, two_stage_vae, rae, rae_l2, rae_gp, rae_sn, ae, ae_l2, eae or eae_linear. A setting below that the
    objective does not read must be left at its default."""
    reconstruction_weight: float | None = setting(None, above=0)
    """Weight of the squared error, summed per image. Default: 1/(pixels channels); vae, cv_vae, two_stage_vae: 1/channels."""
    entropy_weight: float = 0.006
    """eae, eae_linear: weight w in (squared error per pixel and channel) - w (entropy in nats per latent dimension)."""
    k: int = setting(1, at_least=1)
    """eae, eae_linear: which nearest neighbor the entropy is estimated from; 1 as in the paper."""
    average_k: bool = False
    """eae, eae_linear: take the mean over the first k log distances instead of the k-th: a less noisy gradient."""
    eps2: float = setting(1e-4, above=0)
    """eae, eae_linear: added to squared neighbor distances inside the logarithm; latents have unit variance."""
    group: str | None = None
    """eae, eae_linear: take the entropy over groups of ranks and its mean over them, where all latents are too many to compare:
    node (the ranks of a machine) or a number of ranks. Default: over all ranks, the same whatever their number."""
    map: str = setting("fixed", choices=("fixed", "redrawn"))
    """eae_linear: the orthonormal map is fixed (drawn from the seed) or redrawn (each step, from seed and step)."""
    map_dim: int | None = setting(None, at_least=1)
    """eae_linear: dimensions of the mapped latent, at most latent_dim. Default: latent_dim."""
    kl_weight: float = setting(0.312, at_least=0)
    """vae, cv_vae, two_stage_vae: weight of the divergence from N(0, I), in nats summed over dimensions."""
    sigma: float = setting(0.7, above=0)
    """cv_vae: the posterior's fixed standard deviation."""
    mmd_weight: float = setting(0.03, at_least=0)
    """wae: weight of the squared maximum mean discrepancy from N(0, I)."""
    input_noise: float = setting(0.0, at_least=0)
    """wae: standard deviation of Gaussian noise on the encoder's input in training, cut off at one deviation."""
    latent_weight: float = setting(1e-4, at_least=0)
    """rae, rae_l2, rae_gp, rae_sn: weight of the mean square of the latent's entries."""
    decoder_weight: float = setting(1e-7, at_least=0)
    """rae_l2, ae_l2: weight of the sum of squares of the decoder's kernels."""
    gradient_weight: float = setting(5e-8, at_least=0)
    """rae_gp: weight of the mean square of the entries of d sum ||D(z)||^2 / dz."""


@dataclass
class TrainConfig:
    """The run."""

    output: str = setting("runs/mnist5k-eae", changeable=True)
    """Run folder: config.yaml, metrics.jsonl, samples, checkpoints, evaluation. Starting again there continues the run."""
    seed: int = setting(0, at_least=0, below=2**63)
    """Fixes the initial weights, the order of the data and every draw."""
    epochs: float = setting(40.0, above=0, changeable=True)
    """Length of the run in passes over the training split."""
    global_batch: int = setting(128, at_least=1)
    """Images a step, over all ranks: the batch that the entropy and the batch norms see."""
    accumulate: int = setting(1, at_least=1)
    """Micro-batches a step, to save memory for a second pass through the encoder. Latent norm, entropy and MMD are still
    those of global_batch images, exactly; the networks' own batch norms see global_batch / accumulate."""
    learning_rate: float = setting(8e-3, above=0)
    """Adam's, at the start."""
    schedule: str = setting("exponential", choices=("exponential", "plateau", "constant"))
    """exponential (x decay after every epoch), plateau (x plateau_factor when validation stands still) or constant."""
    decay: float = setting(0.98, above=0, at_most=1)
    """Factor per epoch of the exponential schedule; the paper advises at least 0.98."""
    plateau_factor: float = setting(0.5, above=0, at_most=1)
    """Factor of the plateau schedule."""
    plateau_patience: int = setting(5, at_least=1)
    """The plateau schedule acts at this many validations in a row without improvement."""
    clip_norm: float | None = setting(None, above=0)
    """Largest norm of the gradient; longer ones are scaled down to it. Default: not clipped."""
    precision: str = setting("fp32", choices=("fp32", "bf16", "fp16"), changeable=True)
    """fp32, bf16 or fp16 (GPU only); entropy, latent statistics and losses stay float32."""
    tf32: bool = setting(False, changeable=True)
    """On GPUs round the factors of float32 products and convolutions to 10 bits: faster; the entropy and the other losses stay
    float32."""
    compile: bool = setting(False, changeable=True)
    """Compile the networks (torch.compile, which wants a C++ compiler); rae_gp's decoder is differentiated twice and left out."""
    channels_last: bool | None = setting(None, changeable=True)
    """Whether convolutions' weights lie channels last in memory: faster. Default: yes, but under DeepSpeed, which cannot, no."""
    checkpoint_activations: bool = setting(False, changeable=True)
    """Save memory: keep one activation of a layer, not two, and compute its batch norm again in backward, to the same bits."""
    deterministic: bool = setting(False, changeable=True)
    """Deterministic GPU kernels: a run that was interrupted then ends with the same bits. On a CPU it always does."""
    device: str = setting("auto", choices=("auto", "cpu"), changeable=True)
    """auto (GPUs where torch sees any) or cpu."""
    timeout: float = setting(600.0, above=0, below=2**31, changeable=True)
    """Seconds after which a rank that waits for another gives up."""
    validation_images: int = setting(10_000, at_least=1)
    """At most this many validation images; the entropy compares each with every other."""
    validate_every: int | None = setting(None, at_least=1)
    """Images between validations. Default: one epoch."""
    sample_every: int | None = setting(None, at_least=1, changeable=True)
    """Images between grids of samples, reconstructions and interpolations. Default: one epoch, so look early."""
    save_every: int | None = setting(None, at_least=1, changeable=True)
    """Images between checkpoints. Default: one epoch."""
    log_every: int | None = setting(None, at_least=1, changeable=True)
    """Images between lines in metrics.jsonl. Default: ten steps."""
    profile: int = setting(0, at_least=0, changeable=True)
    """Steps of this start, after the first three, of which every rank writes a trace: RUN/profile, for https://ui.perfetto.dev."""
    keep: int = setting(3, at_least=1, changeable=True)
    """How many of the last checkpoints are kept, besides the best."""
    trackers: list[str] = setting(["tensorboard"], changeable=True)
    """Where the metrics go besides metrics.jsonl: names of accelerate's trackers."""


@dataclass
class EvaluateConfig:
    """Judging a checkpoint."""

    split: str = setting("test", changeable=True)
    """The split that is reconstructed and interpolated."""
    reference: str = setting("test", changeable=True)
    """The split that images are compared with."""
    densities: list[str] = setting([], changeable=True)
    """Densities fitted to the training latents and drawn from: isotropic, mvg, gmm, two_stage. Default: isotropic, mvg and gmm;
    for two_stage_vae two_stage."""
    components: int = setting(10, at_least=1, changeable=True)
    """Components of gmm."""
    second_stage_weight: float = setting(1.5e-3, above=0, changeable=True)
    """Weight of the divergence in the second stage of two_stage; the official values are 1.5e-3 for MNIST, 1e-3 for CIFAR-10
    and 2e-3 for CelebA."""
    second_stage_epochs: int = setting(100, at_least=1, changeable=True)
    """Passes over the training latents in the second stage of two_stage, as officially."""
    features: str | None = setting(None, changeable=True)
    """Whose features images are compared by: inception (the distance is fid), efflite0 (images at 128 x 128), efflite0_64px (at
    64 x 64) or package.module:function of your own, named on the command line. Default: efflite0_64px for images of up to
    64 pixels, else efflite0."""
    preprocessing: str | None = setting(None, changeable=True)
    """Of inception: pytorch-fid (default), tf1 or clean."""
    inception_weights: str | None = setting(None, changeable=True)
    """The file of inception's weights. Default: where torch's hub keeps it."""
    frechet: str = setting("svd", choices=("svd", "sqrtm"), changeable=True)
    """The matrix root of the Fréchet distance: svd, or sqrtm as pytorch-fid takes it."""
    neighbor_images: int = setting(10_000, at_least=2, changeable=True)
    """At most this many images of a set are compared by the kernel distance, precision, recall, density and coverage, the last
    four from 6 images on; and the latents of at most so many with N(0, I)."""
    cache: str = setting("~/.cache/eae_dist", changeable=True)
    """Folder where the statistics of reference images are kept."""
    batch: int = setting(256, at_least=1, changeable=True)
    """Images a forward pass, per rank."""
    count: int | None = setting(None, at_least=1, changeable=True)
    """How many images of the split and of the reference, from their start, and how many draws. Default: all of the split."""
    seed: int = setting(0, at_least=0, below=2**63, changeable=True)
    """Fixes the drawn samples, the mid-points' partners, the starts of gmm and the training of two_stage."""


@dataclass
class IndexConfig:
    """Search among the latents of a data set."""

    kind: str = setting("auto", choices=("auto", "flat", "ivf_flat", "ivf_pq", "hnsw"), changeable=True)
    """flat (exact), ivf_flat, ivf_pq (for more latents than fit into memory), hnsw (quickest for single queries, slow to build)
    or auto: one of the first three, by number, memory and recall."""
    recall: float = setting(0.95, above=0, at_most=1, changeable=True)
    """The share of the ten nearest neighbors that an index is set to find; 1: all, by flat."""
    memory: int | None = setting(None, at_least=1, changeable=True)
    """Bytes that auto may take, per rank. Default: half of the machine's, over its ranks."""
    split: str = setting("train", changeable=True)
    """The split whose latents are searched."""
    query_split: str = setting("test", changeable=True)
    """The split whose images' neighbors are looked for."""
    k: int = setting(5, at_least=1, changeable=True)
    """How many neighbors are shown, and vote on a label."""
    density: str = setting("isotropic", changeable=True)
    """What samples are drawn from whose neighbors are looked for; others than isotropic are those that evaluate fitted."""
    samples: int = setting(10_000, at_least=1, changeable=True)
    """How many samples are drawn, at most as many as there are queries."""
    duplicate_ratio: float = setting(0.1, above=0, changeable=True)
    """Rows of the split are near-duplicates if their distance is below this share of the median distance to a neighbor."""
    seed: int = setting(0, at_least=0, below=2**63, changeable=True)
    """Fixes the samples, and the rows that an index is trained on."""


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
    """Raises ValueError for a value out of its bounds, and for settings that do not go together, whatever the data."""
    for section in fields(Config):
        settings = getattr(config, section.name)
        for key in fields(settings):
            bounds: Bounds = key.metadata.get("bounds", Bounds())
            bounds.check(f"{section.name}.{key.name}", getattr(settings, key.name))
    train, objective = config.train, config.objective
    if train.schedule == "plateau" and config.data.validation is None:
        raise ValueError("train.schedule=plateau follows the validation loss; set data.validation")
    if train.compile and train.checkpoint_activations:
        raise ValueError("train.compile=true: compiled networks cannot be computed again; set train.checkpoint_activations=false")
    # A neighbor other than itself for every row; objectives without an entropy refuse a k of their own.
    if objective.k >= train.global_batch and (objective.name.startswith("eae") or objective.k > 1):
        raise ValueError(f"objective.k={objective.k} needs more than {objective.k} rows, train.global_batch={train.global_batch}")
