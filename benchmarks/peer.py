"""A training epoch against pythae's trainer, with the same networks, batch and images, for each objective that pythae has.

pythae holds the images in memory as floating point; ours come from shards of PNG files. Its networks have torch's own batch norm
and memory format, because a user of pythae would write them so. The gradient penalty of its RAE-GP is another one, with respect
to the image.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import torch

from benchmarks.images import picture, write_shards
from benchmarks.steps import training
from benchmarks.table import Row, take_turns
from eae_dist.config import Config, load_config
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.objectives import build_objective, resolve

SHAPE, BATCH, STEPS = (1, 32, 32), 128, 12  # steps per epoch
ROUNDS = 7
# Ours -> pythae's model and configuration.
PEERS = {
    "vae": ("VAE", "VAEConfig"),
    "wae": ("WAE_MMD", "WAE_MMD_Config"),
    "rae_l2": ("RAE_L2", "RAE_L2_Config"),
    "rae_gp": ("RAE_GP", "RAE_GP_Config"),
    "ae": ("AE", "AEConfig"),
}


def rows() -> Iterator[Row]:
    """Yields the rows of the table."""
    logging.disable(logging.INFO)
    images = torch.from_numpy(np.stack([picture(number, SHAPE) for number in range(STEPS * BATCH)])).permute(0, 3, 1, 2) / 255
    with tempfile.TemporaryDirectory() as folder:
        root = write_shards(Path(folder) / "shards", SHAPE, "png", shards=4, samples=STEPS * BATCH // 4)
        for name in PEERS:
            config = load_config(
                [
                    f"objective.name={name}",
                    f"data.root={root}",
                    f"train.output={folder}/run",
                    f"train.global_batch={BATCH}",
                    "data.validation=null",
                    "train.device=cpu",
                    "train.trackers=[]",
                ]
            )
            config = resolve(config, SHAPE)
            with training(config) as take_steps, redirect_stderr(StringIO()):  # pythae's progress bars
                turns = {"ours": lambda run=take_steps: run(STEPS), "theirs": their_epoch(config, images, Path(folder))}
                seconds = take_turns(turns, ROUNDS)
            ours, theirs = seconds["ours"], seconds["theirs"]
            yield Row(
                f"epoch of {STEPS * BATCH:,} images, {name}, small: pythae",
                f"{ours.cpu:.2f} s",
                f"{theirs.cpu:.2f} s",
                f"{theirs.cpu / ours.cpu:.2f}x",
                beside=f"wall {theirs.wall / ours.wall:.2f}x",
            )


def their_epoch(config: Config, images: torch.Tensor, folder: Path) -> Callable[[], object]:
    """Returns a function that runs an epoch of pythae's BaseTrainer with our networks."""
    from pythae import models
    from pythae.data.datasets import BaseDataset
    from pythae.trainers import BaseTrainer, BaseTrainerConfig

    autoencoder = build_objective(config.model, config.objective, SHAPE, config.train.seed).autoencoder
    with_torch_norms(autoencoder.to(memory_format=torch.contiguous_format))
    model, settings = (getattr(models, name) for name in PEERS[config.objective.name])
    encoder, decoder = pythae_networks(autoencoder)
    model = model(settings(input_dim=SHAPE, latent_dim=config.model.latent_dim), encoder=encoder, decoder=decoder)
    training = BaseTrainerConfig(
        output_dir=str(folder / "pythae"),
        per_device_train_batch_size=BATCH,
        learning_rate=config.train.learning_rate,
        no_cuda=True,
    )
    trainer = BaseTrainer(model, BaseDataset(images, torch.zeros(len(images))), training_config=training)
    trainer.prepare_training()
    return lambda: trainer.train_step(epoch=1)


def with_torch_norms(network: torch.nn.Module) -> None:
    """Replaces our batch norms by torch's own."""
    for name, layer in network.named_children():
        if isinstance(layer, GlobalBatchNorm):
            setattr(network, name, torch.nn.BatchNorm2d(len(layer.weight), layer.eps, layer.momentum))
        else:
            with_torch_norms(layer)


def pythae_networks(autoencoder: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Returns our encoder and decoder in the form that pythae needs."""
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.autoencoder = torch.nn.ModuleList([autoencoder.encoder])

        def forward(self, x):
            h = self.autoencoder[0](x)
            if autoencoder.variational:
                mean, log_sigma = h.chunk(2, 1)
                return ModelOutput(embedding=mean, log_covariance=2 * torch.tanh(log_sigma))
            return ModelOutput(embedding=h)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.network = autoencoder.decoder

        def forward(self, z):
            return ModelOutput(reconstruction=self.network(z))

    return Encoder(), Decoder()
