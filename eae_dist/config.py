"""The configuration: dataclasses <- YAML files in order <- key=value arguments, the later winning.

A default stands once, here; a docstring stands under every field and is what `--help` prints. Fields marked `changeable` may
differ when a run folder is continued; any other difference is refused there.
"""

import ast
import copy
import difflib
import functools
import inspect
import math
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from eae_dist.durable import replace_file


def changeable(default):
    """A field that may change when a run is continued."""
    return field(default=default, metadata={"changeable": True})


@dataclass
class DataConfig:
    """Where the images come from and how they are read."""

    root: str = changeable("shards/mnist5k")
    """Folder of shards with an index.json, as `python -m eae_dist.pack` writes it; or its http, https or s3 address."""
    split: str = "train"
    """The split to train on."""
    validation: str | None = "validation"
    """The split whose loss chooses the best checkpoint and steers a plateau schedule; null: none."""
    lanes: int | None = None
    """Into how many runs a pass is cut; divides train.global_batch, bounds the number of ranks. Default: train.global_batch; for
    remote shards the largest divisor of it such that twice as many shards as lanes fit into data.cache_bytes."""
    workers: int = changeable(0)
    """Processes that read and decode, per rank; 0 reads ahead in a thread."""
    prefetch: int = changeable(2)
    """Batches read ahead, per worker."""
    cache: str = changeable("~/.cache/eae_dist/shards")
    """Folder on a local disk in which remote shards are kept; ranks, workers and jobs of a machine share it."""
    cache_bytes: int = changeable(50_000_000_000)
    """At most this many bytes are kept there. Another value makes other lanes: to change it in a run, also set data.lanes to
    what the run's config.yaml says."""
    retries: int = changeable(5)
    """How often a failed fetch is tried again, after 1 second, then 2, 4, ..., at most 30."""
    timeout: float = changeable(30.0)
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
    width: int | None = None
    """Channels of the first encoder layer. Default: the network's own."""
    latent_dim: int | None = None
    """Latent dimensions d. Default: the network's own for gray or color images; the paper advises at least 32 for color."""
    norm: str = "batch"
    """batch (a batch norm after every layer but the last) or none; an EAE's latent is batch-normed in either case."""
    norm_momentum: float = 0.1
    """Weight of a new batch in the batch norms' running statistics. The RAE paper's Keras layers: 0.01."""
    norm_eps: float = 1e-3
    """Added to the variance in the networks' batch norms (Keras' default; the latent's own norm adds 1e-5)."""


@dataclass
class ObjectiveConfig:
    """The loss: one row of the paper's table."""

    name: str = "eae"
    """vae, cv_vae, wae, two_stage_vae, rae, rae_l2, rae_gp, rae_sn, ae, ae_l2, eae or eae_linear. A setting below that the
    objective does not read must be left at its default."""
    reconstruction_weight: float | None = None
    """Weight of the squared error, summed per image. Default: 1/(pixels channels); vae, cv_vae, two_stage_vae: 1/channels."""
    entropy_weight: float = 0.006
    """eae, eae_linear: weight w in (squared error per pixel and channel) - w (entropy in nats per latent dimension)."""
    k: int = 1
    """eae, eae_linear: which nearest neighbor the entropy is estimated from; 1 as in the paper."""
    average_k: bool = False
    """eae, eae_linear: take the mean over the first k log distances instead of the k-th: a less noisy gradient."""
    eps2: float = 1e-4
    """eae, eae_linear: added to squared neighbor distances inside the logarithm; latents have unit variance."""
    group: str | None = None
    """eae, eae_linear: take the entropy over groups of ranks and its mean over them, where all latents are too many to compare:
    node (the ranks of a machine) or a number of ranks. Default: over all ranks, the same whatever their number."""
    map: str = "fixed"
    """eae_linear: the orthonormal map is fixed (drawn from the seed) or redrawn (each step, from seed and step)."""
    map_dim: int | None = None
    """eae_linear: dimensions of the mapped latent, at most latent_dim. Default: latent_dim."""
    kl_weight: float = 0.312
    """vae, cv_vae, two_stage_vae: weight of the divergence from N(0, I), in nats summed over dimensions."""
    sigma: float = 0.7
    """cv_vae: the posterior's fixed standard deviation."""
    mmd_weight: float = 0.03
    """wae: weight of the squared maximum mean discrepancy from N(0, I)."""
    input_noise: float = 0.0
    """wae: standard deviation of Gaussian noise on the encoder's input in training, cut off at one deviation."""
    latent_weight: float = 1e-4
    """rae, rae_l2, rae_gp, rae_sn: weight of the mean square of the latent's entries."""
    decoder_weight: float = 1e-7
    """rae_l2, ae_l2: weight of the sum of squares of the decoder's kernels."""
    gradient_weight: float = 5e-8
    """rae_gp: weight of the mean square of the entries of d sum ||D(z)||^2 / dz."""


@dataclass
class TrainConfig:
    """The run."""

    output: str = changeable("runs/mnist5k-eae")
    """Run folder: config.yaml, metrics.jsonl, samples, checkpoints, evaluation. Starting again there continues the run."""
    seed: int = 0
    """Fixes the initial weights, the order of the data and every draw."""
    epochs: float = changeable(40.0)
    """Length of the run in passes over the training split."""
    global_batch: int = 128
    """Images a step, over all ranks: the batch that the entropy and the batch norms see."""
    accumulate: int = 1
    """Micro-batches a step, to save memory for a second pass through the encoder. Latent norm, entropy and discrepancy are still
    those of global_batch images, exactly; the networks' own batch norms see global_batch / accumulate."""
    learning_rate: float = 8e-3
    """Adam's, at the start."""
    schedule: str = "exponential"
    """exponential (x decay after every epoch), plateau (x plateau_factor when validation stands still) or constant."""
    decay: float = 0.98
    """Factor per epoch of the exponential schedule; the paper advises at least 0.98."""
    plateau_factor: float = 0.5
    """Factor of the plateau schedule."""
    plateau_patience: int = 5
    """The plateau schedule acts at this many validations in a row without improvement."""
    clip_norm: float | None = None
    """Largest norm of the gradient; longer ones are scaled down to it. Default: not clipped."""
    precision: str = changeable("no")
    """no (float32), bf16 or fp16 (GPU only); entropy, latent statistics and losses stay float32."""
    tf32: bool = changeable(False)
    """On GPUs round the factors of float32 products and convolutions to 10 bits: faster; the entropy and the other losses stay
    float32."""
    compile: bool = changeable(False)
    """Compile the networks (torch.compile, which wants a C++ compiler); rae_gp's decoder is differentiated twice and left out."""
    channels_last: bool | None = changeable(None)
    """Whether convolutions' weights lie channels last in memory: faster. Default: yes, but under DeepSpeed, which cannot, no."""
    checkpoint_activations: bool = changeable(False)
    """Save memory: keep one activation of a layer, not two, and compute its batch norm again in backward, to the same bits."""
    deterministic: bool = changeable(False)
    """Deterministic GPU kernels: a run that was interrupted then ends with the same bits. On a CPU it always does."""
    device: str = changeable("auto")
    """auto (GPUs where torch sees any) or cpu."""
    timeout: float = changeable(600.0)
    """Seconds after which a rank that waits for another gives up."""
    validation_images: int = 10_000
    """At most this many validation images; the entropy compares each with every other."""
    validate_every: int | None = None
    """Images between validations. Default: one epoch."""
    sample_every: int | None = changeable(None)
    """Images between grids of samples, reconstructions and interpolations. Default: one epoch, so look early."""
    save_every: int | None = changeable(None)
    """Images between checkpoints. Default: one epoch."""
    log_every: int | None = changeable(None)
    """Images between lines in metrics.jsonl. Default: ten steps."""
    profile: int = changeable(0)
    """Steps of this start, after the first three, of which every rank writes a trace: RUN/profile, for https://ui.perfetto.dev."""
    keep: int = changeable(3)
    """How many of the last checkpoints are kept, besides the best."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"], metadata={"changeable": True})
    """Where the metrics go besides metrics.jsonl: names of accelerate's trackers."""


@dataclass
class EvaluateConfig:
    """Judging a checkpoint."""

    split: str = changeable("test")
    """The split that is reconstructed and interpolated."""
    reference: str = changeable("test")
    """The split that images are compared with."""
    densities: list[str] = field(default_factory=list, metadata={"changeable": True})
    """Densities fitted to the training latents and drawn from: isotropic, mvg, gmm, two_stage. Default: isotropic, mvg and gmm;
    for two_stage_vae two_stage."""
    components: int = changeable(10)
    """Components of gmm."""
    second_stage_weight: float = changeable(1.5e-3)
    """Weight of the divergence in the second stage of two_stage; the official values are 1.5e-3 for MNIST, 1e-3 for CIFAR-10
    and 2e-3 for CelebA."""
    second_stage_epochs: int = changeable(100)
    """Passes over the training latents in the second stage of two_stage, as officially."""
    features: str | None = changeable(None)
    """Whose features images are compared by: inception (the distance is fid), efflite0 (images at 128 x 128), efflite0_64px (at
    64 x 64) or package.module:function of your own, named on the command line. Default: efflite0_64px for images of up to
    64 pixels, else efflite0."""
    preprocessing: str | None = changeable(None)
    """Of inception: pytorch-fid (default), tf1 or clean."""
    inception_weights: str | None = changeable(None)
    """The file of inception's weights. Default: where torch's hub keeps it."""
    frechet: str = changeable("svd")
    """The matrix root of the Fréchet distance: svd, or sqrtm as pytorch-fid takes it."""
    neighbor_images: int = changeable(10_000)
    """At most this many images of a set are compared by the kernel distance, precision, recall, density and coverage, the last
    four from 6 images on; and the latents of at most so many with N(0, I)."""
    cache: str = changeable("~/.cache/eae_dist")
    """Folder where the statistics of reference images are kept."""
    batch: int = changeable(256)
    """Images a forward pass, per rank."""
    count: int | None = changeable(None)
    """How many images of the split and of the reference, from their start, and how many draws. Default: all of the split."""
    seed: int = changeable(0)
    """Fixes the drawn samples, the mid-points' partners, the starts of gmm and the training of two_stage."""


@dataclass
class IndexConfig:
    """Search among the latents of a data set."""

    kind: str = changeable("auto")
    """flat (exact), ivf_flat, ivf_pq (for more latents than fit into memory), hnsw (quickest for single queries, slow to build)
    or auto: one of the first three, by number, memory and recall."""
    recall: float = changeable(0.95)
    """The share of the ten nearest neighbors that an index is set to find; 1: all, by flat."""
    memory: int | None = changeable(None)
    """Bytes that auto may take, per rank. Default: half of the machine's, over its ranks."""
    split: str = changeable("train")
    """The split whose latents are searched."""
    queries: str = changeable("test")
    """The split whose images' neighbors are looked for."""
    k: int = changeable(5)
    """How many neighbors are shown, and vote on a label."""
    density: str = changeable("isotropic")
    """What samples are drawn from whose neighbors are looked for; others than isotropic are those that evaluate fitted."""
    samples: int = changeable(10_000)
    """How many samples are drawn, at most as many as there are queries."""
    near: float = changeable(0.1)
    """Rows of the split are near-duplicates if their distance is below this share of the median distance to a neighbor."""
    seed: int = changeable(0)
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


def load_config(argv: Sequence[str] = ()) -> Config:
    """The configuration of a command line: `[--config FILE.yaml ...] [key=value ...]`; `--help` prints every key and exits.

    Raises ValueError for an unknown key (with the nearest known one), a wrong type, an unreadable file or a value out of range.
    """
    files, assignments = split_arguments(argv)
    layers = [_from_file(file) for file in files]
    layers += [_from_assignment(text) for text in assignments]
    return _merged(layers)


def read_config(path: Path) -> Config:
    """The configuration in one YAML file, such as a run folder's config.yaml."""
    return _merged([_from_file(str(path))])


def override(config: Config, assignments: Sequence[str]) -> Config:
    """The configuration with `key=value` texts applied."""
    base = (OmegaConf.structured(config), "the configuration")
    return _merged([base, *(_from_assignment(text) for text in assignments)])


def save_config(config: Config, path: Path) -> None:
    replace_file(path, OmegaConf.to_yaml(OmegaConf.structured(config)))


def is_assignment(text: str) -> bool:
    """Whether a word of a command line sets a key, and is not a path with a = in it."""
    return "=" in text and text.partition(".")[0] in {section.name for section in fields(Config)}


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits a command line into the files after --config and the key=value texts."""
    files, assignments, taking_files = [], [], False
    for place, argument in enumerate(argv):
        if argument in ("-h", "--help"):
            print(help_text())
            sys.exit(0)
        if argument == "--config":
            taking_files = True
            following = "".join(argv[place + 1 : place + 2])
            if not following or "=" in following or following.startswith("-"):
                raise ValueError("--config wants a YAML file after it (see --help)")
        elif argument.startswith("--config="):
            files.append(argument.removeprefix("--config="))
        elif argument.startswith("-"):
            raise ValueError(f"unknown option {argument}; settings are given as key=value, files with --config FILE (see --help)")
        elif "=" in argument:
            taking_files = False
            assignments.append(argument)
        elif taking_files:
            files.append(argument)
        else:
            raise ValueError(f"{argument!r} is neither key=value nor a file after --config (see --help)")
    return files, assignments


def flatten(config: Config) -> dict[str, object]:
    """The configuration as {"section.key": value}."""
    sections = ((section.name, getattr(config, section.name)) for section in fields(config))
    return {f"{name}.{key.name}": getattr(section, key.name) for name, section in sections for key in fields(section)}


def changed_keys(before: Config, after: Config, *, changeable: bool) -> list[str]:
    """Lines "key: before -> after" of the keys that differ and may (or may not) change when a run is continued."""
    old, new = flatten(before), flatten(after)
    marks = {f"{s.name}.{f.name}": f.metadata.get("changeable", False) for s in fields(Config) for f in fields(s.default_factory)}
    return [f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key] and marks[key] is changeable]


def help_text() -> str:
    """Every key with its default and its meaning."""
    lines = ["settings, as key=value or in YAML files after --config:"]
    for section in fields(Config):
        cls = section.default_factory
        meanings = _field_docstrings(cls)
        lines += ["", f"{section.name}: {cls.__doc__}"]
        default = cls()
        for key in fields(cls):
            value = getattr(default, key.name)
            name = key.type.__name__ if isinstance(key.type, type) and key.type is not list else str(key.type)
            head = f"  {section.name}.{key.name}={'null' if value is None else value}  ({name})"
            lines += [head, textwrap.indent(textwrap.fill(meanings[key.name], 110), "      ")]
    return "\n".join(lines)


def _field_docstrings(cls: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
    pairs = zip(body, body[1:], strict=False)
    return {
        statement.target.id: " ".join(ast.literal_eval(after.value).split())
        for statement, after in pairs
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr)
    }


def _from_file(file: str) -> tuple[object, str]:
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{file}: there is no such configuration file")
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # YAML and OmegaConf raise many kinds
        raise ValueError(f"{file} is not a YAML mapping: {' '.join(str(error).split())}") from error
    return loaded, file


def _from_assignment(text: str) -> tuple[object, str]:
    try:
        return OmegaConf.from_dotlist([text]), text
    except Exception as error:
        raise ValueError(f"{text!r} cannot be read as key=value: {error}") from error


@functools.cache
def _defaults() -> DictConfig:
    return OmegaConf.structured(Config)


def _merged(layers: list[tuple[object, str]]) -> Config:
    config = copy.deepcopy(_defaults())  # a fifth of the time
    for layer, origin in layers:
        _check_keys(layer, origin)
        try:
            config.merge_with(layer)
        except (OmegaConfBaseException, TypeError) as error:  # a list given item by item is a TypeError
            key = getattr(error, "full_key", None)
            raise ValueError(f"{origin}: {str(error).splitlines()[0]}" + (f" ({key})" if key else "")) from error
    result = OmegaConf.to_object(config)
    for section, key in ((result.data, "root"), (result.train, "output")):
        setattr(section, key, os.path.expanduser(getattr(section, key)))
    _check_values(result)
    return result


def _check_keys(layer, origin: str) -> None:
    """Raises ValueError unless the layer consists of known sections with known keys and plain values."""
    text = OmegaConf.to_yaml(layer)
    if "${" in text:
        raise ValueError(f"{origin}: a configuration holds plain values; ${{...}} is not resolved")
    if "???" in text:
        raise ValueError(f"{origin}: ??? stands for a missing value; give one")
    if not OmegaConf.is_dict(layer):
        raise ValueError(f"{origin}: wanted sections with keys, such as train: {{seed: 1}}")
    sections = {section.name: section.default_factory for section in fields(Config)}
    known = {name: {key.name for key in fields(section)} for name, section in sections.items()}
    for name in layer:
        if name not in known:
            full = [f"{section}.{name}" for section, keys in known.items() if name in keys]
            hint = f"; did you mean {full[0]}?" if full else _suggestion(str(name), known)
            raise ValueError(f"{origin}: unknown section {name!r}{hint}")
        section = layer[name]
        if not OmegaConf.is_dict(section):
            raise ValueError(f"{origin}: {name} is a section; set one of its keys, such as {name}.{sorted(known[name])[0]}=...")
        for key in section:
            if key not in known[name]:
                every = [f"{s}.{k}" for s, keys in known.items() for k in keys]
                raise ValueError(f"{origin}: unknown key {name}.{key}{_suggestion(f'{name}.{key}', every)}")
        if section.get("precision") is False:  # YAML reads a bare no as false
            section["precision"] = "no"
        for key in (key.name for key in fields(sections[name]) if key.type in (str, str | None)):
            if isinstance(section.get(key), bool):
                raise ValueError(f"{origin}: {name}.{key} wants text; put it in quotes, or YAML reads it as {section[key]}")
        for key in (key.name for key in fields(sections[name]) if key.type == list[str]):
            if isinstance(section.get(key), str):
                raise ValueError(f"{origin}: {name}.{key} wants a list; write [{section[key]}]")


def _suggestion(name: str, known) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"


def _check_values(config: Config) -> None:
    """What is out of range whatever the data; raises ValueError that names the key."""
    train, objective, data = config.train, config.objective, config.data
    positive = {
        "train.global_batch": train.global_batch,
        "train.accumulate": train.accumulate,
        "train.keep": train.keep,
        "train.epochs": train.epochs,
        "train.learning_rate": train.learning_rate,
        "train.timeout": train.timeout,
        "train.plateau_patience": train.plateau_patience,
        "train.validation_images": train.validation_images,
        "train.validate_every": train.validate_every,
        "train.sample_every": train.sample_every,
        "train.save_every": train.save_every,
        "train.log_every": train.log_every,
        "train.clip_norm": train.clip_norm,
        "data.lanes": data.lanes,
        "data.prefetch": data.prefetch,
        "data.cache_bytes": data.cache_bytes,
        "data.timeout": data.timeout,
        "model.width": config.model.width,
        "model.latent_dim": config.model.latent_dim,
        "model.norm_eps": config.model.norm_eps,
        "objective.k": objective.k,
        "objective.eps2": objective.eps2,
        "objective.map_dim": objective.map_dim,
        "objective.reconstruction_weight": objective.reconstruction_weight,
        "objective.sigma": objective.sigma,
        "evaluate.batch": config.evaluate.batch,
        "evaluate.count": config.evaluate.count,
        "evaluate.components": config.evaluate.components,
        "evaluate.second_stage_weight": config.evaluate.second_stage_weight,
        "evaluate.second_stage_epochs": config.evaluate.second_stage_epochs,
        "evaluate.neighbor_images": config.evaluate.neighbor_images,
        "index.memory": config.index.memory,
        "index.k": config.index.k,
        "index.samples": config.index.samples,
        "index.near": config.index.near,
    }
    for key, value in positive.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{key}={value} must be greater than 0" + (" and finite" if value == math.inf else ""))
    if config.evaluate.neighbor_images < 2:
        raise ValueError(f"evaluate.neighbor_images={config.evaluate.neighbor_images} must be at least 2")
    for key, value in vars(objective).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"objective.{key}={value} must be finite")
    for key, value in {
        "train.seed": train.seed,
        "evaluate.seed": config.evaluate.seed,
        "index.seed": config.index.seed,
        "data.workers": data.workers,
        "data.retries": data.retries,
        "train.profile": train.profile,
        "objective.kl_weight": objective.kl_weight,
        "objective.mmd_weight": objective.mmd_weight,
        "objective.input_noise": objective.input_noise,
        "objective.latent_weight": objective.latent_weight,
        "objective.decoder_weight": objective.decoder_weight,
        "objective.gradient_weight": objective.gradient_weight,
    }.items():
        if value < 0:
            raise ValueError(f"{key}={value} must not be negative")
    for key, value, bits in (
        ("train.seed", train.seed, 63),
        ("evaluate.seed", config.evaluate.seed, 63),
        ("index.seed", config.index.seed, 63),
        ("train.timeout", train.timeout, 31),
    ):
        if value >= 2**bits:
            raise ValueError(f"{key}={value} must be less than 2^{bits}")
    for key, value in {
        "train.decay": train.decay,
        "train.plateau_factor": train.plateau_factor,
        "model.norm_momentum": config.model.norm_momentum,
        "index.recall": config.index.recall,
    }.items():
        if not 0 < value <= 1:
            raise ValueError(f"{key}={value} must lie in (0, 1]")
    choices = {
        "train.schedule": (train.schedule, ("exponential", "plateau", "constant")),
        "train.precision": (train.precision, ("no", "bf16", "fp16")),
        "train.device": (train.device, ("auto", "cpu")),
        "objective.map": (objective.map, ("fixed", "redrawn")),
        "evaluate.frechet": (config.evaluate.frechet, ("svd", "sqrtm")),
        "index.kind": (config.index.kind, ("auto", "flat", "ivf_flat", "ivf_pq", "hnsw")),
    }
    for key, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{key}={value} is unknown; it is one of {', '.join(known)}")
    if train.schedule == "plateau" and data.validation is None:
        raise ValueError("train.schedule=plateau follows the validation loss; set data.validation")
    if train.compile and train.checkpoint_activations:
        raise ValueError("train.compile=true: compiled networks cannot be computed again; set train.checkpoint_activations=false")
    # A neighbor other than itself for every row; objectives without an entropy refuse a k of their own.
    if objective.k >= train.global_batch and (objective.name.startswith("eae") or objective.k > 1):
        raise ValueError(f"objective.k={objective.k} needs more than {objective.k} rows, train.global_batch={train.global_batch}")


assert all(is_dataclass(section.default_factory) for section in fields(Config))
