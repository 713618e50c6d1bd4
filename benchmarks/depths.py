"""The network `small` with one to four convolutions in the encoder and in the decoder; its own number is three.

Choose them by model.encoder=benchmarks.depths:Encoder2 and model.decoder=benchmarks.depths:Decoder2.
"""

from dataclasses import replace

from eae_dist.model.networks import NETWORKS, ConvDecoder, ConvEncoder, Family

NORM = {"eps": 1e-3, "momentum": 0.1}  # the defaults of model.norm_eps and model.norm_momentum


def family(convolutions: int) -> Family:
    """Returns the sizes of `small` with this number of convolutions; each one more halves the side and doubles the channels."""
    channels = tuple(2**i for i in range(convolutions))
    return replace(NETWORKS["small"], encoder=channels, decoder=channels[::-1])


class _Encoder(ConvEncoder):
    convolutions: int

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int, width: int, bias: bool):
        super().__init__(family(self.convolutions), image_shape, latent_dim, width, bias=bias, norm=NORM)


class _Decoder(ConvDecoder):
    convolutions: int

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int, width: int):
        super().__init__(family(self.convolutions), image_shape, latent_dim, width, norm=NORM)


Encoder1, Encoder2, Encoder3, Encoder4 = (type(f"Encoder{n}", (_Encoder,), {"convolutions": n}) for n in (1, 2, 3, 4))
Decoder1, Decoder2, Decoder3, Decoder4 = (type(f"Decoder{n}", (_Decoder,), {"convolutions": n}) for n in (1, 2, 3, 4))
