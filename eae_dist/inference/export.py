"""A trained model as files that run without this package: torch.export programs, and ONNX for other runtimes."""

import copy
import io
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from eae_dist.inference.trained_model import TrainedModel
from eae_dist.model.autoencoder import Autoencoder
from eae_dist.numerics.atomic_files import replace_file


class Encoder(nn.Module):
    """Images [b, c, h, w] in [0, 1] -> latents [b, d], as `TrainedModel.encode`."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.encoder, self.latent_norm, self.latent_dim = autoencoder.encoder, autoencoder.latent_norm, autoencoder.latent_dim

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the latents of images, [b, c, h, w] -> [b, d]."""
        means = self.encoder(images)[:, : self.latent_dim]  # a variational model has deviations behind them
        return means if self.latent_norm is None else self.latent_norm(means)


class Decoder(nn.Module):
    """Latents [b, d] -> images [b, c, h, w] in [0, 1], as `TrainedModel.decode`."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.decoder = autoencoder.decoder

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the images of latents, [b, d] -> [b, c, h, w]."""
        return self.decoder(latents)


def export(model: TrainedModel, folder: str | Path, onnx: bool = False) -> list[Path]:
    """Writes encoder.pt2 and decoder.pt2 and, with `onnx`, encoder.onnx and decoder.onnx into the folder; returns their paths.

    Batches may have any size. The weights stay on the model's device and type. Each file appears whole or not at all.
    Raises ImportError where `onnx` is asked for and its packages are missing.
    """
    if onnx and (missing := [name for name in ("onnx", "onnxscript") if find_spec(name) is None]):
        raise ImportError(f"an ONNX export needs {' and '.join(missing)}; run `pip install 'eae-dist[onnx]'`")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    like = next(model.parameters())
    parts = {
        "encoder": (Encoder(model.autoencoder), "images", like.new_zeros(2, *model.image_shape)),
        "decoder": (Decoder(model.autoencoder), "latents", like.new_zeros(2, model.latent_dim)),
    }
    written = []
    for name, (part, argument, example) in parts.items():
        part = copy.deepcopy(part).eval().to(memory_format=torch.contiguous_format)  # torch.export.save warns of other formats
        with torch.no_grad():
            program = torch.export.export(part, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.export.save(program, file := io.BytesIO())
        replace_file(folder / f"{name}.pt2", file.getvalue())
        written.append(folder / f"{name}.pt2")
        if onnx:
            output = "latents" if argument == "images" else "images"
            exported = torch.onnx.export(program, (), input_names=[argument], output_names=[output], dynamo=True, verbose=False)
            assert exported is not None  # None is for dynamo=False
            replace_file(folder / f"{name}.onnx", exported.model_proto.SerializeToString())
            written.append(folder / f"{name}.onnx")
    return written
