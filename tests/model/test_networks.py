"""The networks, against the layers of Ghosh et al. (ICLR 2020) and Keras' definition of "same" padding."""

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eae_dist.config import ModelConfig, ObjectiveConfig
from eae_dist.model.autoencoder import LATENT_EPS, Autoencoder, build_autoencoder, resolve_model
from eae_dist.model.networks import NETWORKS, SameConv2d, SameConvTranspose2d
from eae_dist.model.norm import GlobalBatchNorm
from eae_dist.objectives import OBJECTIVES, build_objective

MNIST, CIFAR, CELEBA = (1, 32, 32), (3, 32, 32), (3, 64, 64)

RAE32_ENCODER = """
    conv 4x4/2 {c}->128,    norm 128,  relu
    conv 4x4/2 128->256,    norm 256,  relu
    conv 4x4/2 256->512,    norm 512,  relu
    conv 4x4/2 512->1024,   norm 1024, relu
    dense 4096->{d}{head}
"""
RAE32_DECODER = """
    dense {d}->65536+bias,  reshape 1024x8x8
    convT 4x4/2 1024->512,  norm 512,  relu
    convT 4x4/2 512->256,   norm 256,  relu
    convT 4x4/1 256->{c}+bias
"""
RAE64_ENCODER = """
    conv 5x5/2 {c}->128,    norm 128,  relu
    conv 5x5/2 128->256,    norm 256,  relu
    conv 5x5/2 256->512,    norm 512,  relu
    conv 5x5/2 512->1024,   norm 1024, relu
    dense 16384->{d}{head}
"""
RAE64_DECODER = """
    dense {d}->65536+bias,  reshape 1024x8x8
    convT 5x5/2 1024->512,  norm 512,  relu
    convT 5x5/2 512->256,   norm 256,  relu
    convT 5x5/2 256->128,   norm 128,  relu
    convT 5x5/1 128->{c}+bias
"""


def built(network: str, shape: tuple[int, int, int], *, latent_norm: bool = True, **settings) -> Autoencoder:
    return build_autoencoder(resolve_model(ModelConfig(network, **settings), shape), shape, latent_norm=latent_norm)


def layers_of(network: nn.Module) -> list[str]:
    """The layers in the order in which they stand, in the words of the tables above."""
    words = []
    for layer in network.modules():
        bias = "+bias" if getattr(layer, "bias", None) is not None else ""
        match layer:
            case nn.Conv2d() | nn.ConvTranspose2d():
                (high, wide), (down, right) = layer.kernel_size, layer.stride
                assert down == right and isinstance(layer, SameConv2d | SameConvTranspose2d)
                kind = "conv" if isinstance(layer, SameConv2d) else "convT"
                words.append(f"{kind} {high}x{wide}/{down} {layer.in_channels}->{layer.out_channels}{bias}")
            case nn.Linear():
                words.append(f"dense {layer.in_features}->{layer.out_features}{bias}")
            case GlobalBatchNorm():
                assert layer.weight is not None and layer.bias is not None
                words.append(f"norm {len(layer.weight)}")
            case nn.Unflatten():
                words.append("reshape " + "x".join(map(str, layer.unflattened_size)))
            case nn.ReLU():
                words.append(type(layer).__name__.lower())
            case _:
                assert list(layer.children()), f"a layer that is not in the tables: {layer}"
    return words


def listed(table: str, **sizes) -> list[str]:
    return [word.strip() for word in re.split(r"[,\n]", table.format(**sizes)) if word.strip()]


@pytest.mark.parametrize("latent_norm", [True, False])
@pytest.mark.parametrize(
    ("network", "shape", "d", "encoder", "decoder"),
    [
        ("rae32", MNIST, 16, RAE32_ENCODER, RAE32_DECODER),
        ("rae32", CIFAR, 128, RAE32_ENCODER, RAE32_DECODER),
        ("rae64", CELEBA, 64, RAE64_ENCODER, RAE64_DECODER),
    ],
)
def test_published_networks_are_the_published_layers(network, shape, d, encoder, decoder, latent_norm):
    with torch.device("meta"):
        model = built(network, shape, latent_norm=latent_norm)
    sizes = {"c": shape[0], "d": d, "head": "" if latent_norm else "+bias"}
    assert layers_of(model.encoder) == listed(encoder, **sizes)
    assert layers_of(model.decoder) == listed(decoder, **sizes)


@pytest.mark.parametrize(
    ("network", "shape", "encoder", "decoder", "head"),
    [
        # Convolutions without bias, two numbers a normed channel, the dense layer; the last layer of the decoder has a bias.
        (
            "rae32",
            MNIST,
            16 * (1 * 128 + 128 * 256 + 256 * 512 + 512 * 1024) + 2 * (128 + 256 + 512 + 1024) + 4096 * 16,
            (16 + 1) * 65536 + 16 * (1024 * 512 + 512 * 256) + 2 * (512 + 256) + 16 * 256 * 1 + 1,
            16,
        ),
        ("rae32", CIFAR, 11_544_320, 18_953_731, 128),
        ("rae64", CELEBA, 18_265_216, 21_474_435, 64),
    ],
)
def test_published_networks_have_the_number_of_parameters_computed_by_hand(network, shape, encoder, decoder, head):
    with torch.device("meta"):
        entropic, plain = (built(network, shape, latent_norm=latent_norm) for latent_norm in (True, False))
    assert sum(p.numel() for p in entropic.encoder.parameters()) == encoder
    assert sum(p.numel() for p in entropic.decoder.parameters()) == decoder
    assert sum(p.numel() for p in entropic.parameters()) == encoder + decoder  # the latent norm has none
    assert sum(p.numel() for p in plain.parameters()) == encoder + decoder + head


# What Keras' padding="same" puts before and after an even number of pixels.
PADDING = {(4, 2): (1, 1), (5, 2): (1, 2), (4, 1): (1, 2), (5, 1): (2, 2)}


def same_conv(x: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """The definition: output pixel i is the sum over taps a of the padded image's pixel stride i + a times the kernel's a-th."""
    k, high, wide = weight.shape[-1], x.shape[2] // stride, x.shape[3] // stride
    before, after = PADDING[k, stride]
    padded = F.pad(x, (before, after, before, after))
    out = 0
    for a in range(k):
        for b in range(k):
            seen = padded[:, :, a : a + stride * high : stride, b : b + stride * wide : stride]
            out = out + torch.einsum("nchw,oc->nohw", seen, weight[:, :, a, b])
    return out


def same_conv_transpose(y: torch.Tensor, weight: torch.Tensor, stride: int) -> torch.Tensor:
    """The definition: input pixel i adds to the padded image's pixels stride i + a; then the padding is cut off."""
    k, (rows, _, high, wide) = weight.shape[-1], y.shape
    before, after = PADDING[k, stride]
    padded = y.new_zeros(rows, weight.shape[1], high * stride + before + after, wide * stride + before + after)
    for a in range(k):
        for b in range(k):
            reached = padded[:, :, a : a + stride * high : stride, b : b + stride * wide : stride]
            reached += torch.einsum("nohw,oc->nchw", y, weight[:, :, a, b])
    return padded[:, :, before : padded.shape[2] - after, before : padded.shape[3] - after]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("kernel", "stride"), PADDING)
def test_convolution_is_keras_same_convolution(kernel, stride):
    layer = SameConv2d(3, 5, kernel, stride).double()
    x = normal(2, 3, 8, 12)
    expected = same_conv(x, layer.weight, stride) + layer.bias[:, None, None]
    assert layer(x).shape == (2, 5, 8 // stride, 12 // stride)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)  # sums of 75 products of order 1


@pytest.mark.parametrize(("kernel", "stride"), PADDING)
def test_transposed_convolution_is_keras_same_transposed_convolution(kernel, stride):
    layer = SameConvTranspose2d(3, 5, kernel, stride).double()
    y = normal(2, 3, 4, 6)
    expected = same_conv_transpose(y, layer.weight, stride) + layer.bias[:, None, None]
    assert layer(y).shape == (2, 5, 4 * stride, 6 * stride)
    torch.testing.assert_close(layer(y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), PADDING)
def test_transposed_convolution_is_the_adjoint_of_the_convolution(kernel, stride):
    down = SameConv2d(3, 5, kernel, stride, bias=False).double()
    up = SameConvTranspose2d(5, 3, kernel, stride, bias=False).double()
    up.weight = down.weight
    x, y = normal(2, 3, 8, 12), normal(2, 5, 8 // stride, 12 // stride, seed=1)
    left, right = (down(x) * y).sum().item(), (x * up(y)).sum().item()
    assert left == pytest.approx(right, rel=1e-12) and abs(left) > 1e-3


@pytest.mark.parametrize(
    ("network", "shape", "centered"),
    [("rae32", MNIST, True), ("rae32", CIFAR, True), ("rae64", CELEBA, False), ("small", (1, 16, 24), True)],
)
def test_networks_compute_what_their_layers_say(network, shape, centered):
    """Above all that rae32 rescales its input to [-1, 1] and rae64 does not."""
    torch.manual_seed(0)
    model = built(network, shape, width=1, latent_dim=3, latent_norm=False).double().eval()
    for norm in model.modules():
        if isinstance(norm, GlobalBatchNorm):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def through(stage: nn.Module, h: torch.Tensor, conv) -> torch.Tensor:
        norms = [layer for layer in stage.modules() if isinstance(layer, GlobalBatchNorm)]
        convs = [layer for layer in stage.modules() if isinstance(layer, SameConv2d | SameConvTranspose2d)]
        for layer, norm in zip(convs, [*norms, None], strict=False):
            h = conv(h, layer.weight, layer.stride[0])
            if norm is not None:
                scale = norm.weight / (norm.running_var + 1e-3).sqrt()
                h = (h - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
                h = h.clamp(min=0)
        return h

    x = normal(2, *shape).sigmoid()
    h = through(model.encoder, 2 * x - 1 if centered else x, same_conv).flatten(1)
    torch.testing.assert_close(model.encode(x), h @ model.encoder.head.weight.T + model.encoder.head.bias, rtol=1e-11, atol=1e-11)

    z = normal(2, 3, seed=1)
    start = {"rae32": (8, 8, 8), "rae64": (8, 8, 8), "small": (4, 2, 3)}[network]
    h = (z @ model.decoder.dense.weight.T + model.decoder.dense.bias).reshape(2, *start)
    last_bias = [layer for layer in model.decoder.modules() if isinstance(layer, SameConvTranspose2d)][-1].bias
    out = through(model.decoder, h, same_conv_transpose) + last_bias[:, None, None]
    torch.testing.assert_close(model.decode(z), out.sigmoid(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("high", "wide"), [(1, 1), (2, 3)])
def test_every_network_returns_latents_and_images_of_every_admissible_shape(network, channels, high, wide):
    step = NETWORKS[network].multiple
    shape = (channels, high * step, wide * step)
    model = built(network, shape, width=1, latent_dim=5).eval()
    latents = model.encode(torch.rand(2, *shape))
    images = model.decode(latents)
    assert latents.shape == (2, 5) and images.shape == (2, *shape)
    assert 0 <= images.min() and images.max() <= 1


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(("high", "wide"), [(28, 28), (32, 28), (33, 47), (5, 5)])
def test_image_sizes_that_do_not_fit_are_errors_that_name_sizes_that_work(network, high, wide):
    with pytest.raises(ValueError, match=f"got {high}x{wide}") as refused:
        resolve_model(ModelConfig(network), (1, high, wide))
    assert f"model.network={network}" in str(refused.value)
    sizes = [int(size) for size in re.findall(r"--size (\d+)", str(refused.value))]
    assert sizes and all(abs(size - high) <= NETWORKS[network].multiple for size in sizes)
    for size in sizes:
        model = built(network, (1, size, size), width=1).eval()
        assert model.decode(model.encode(torch.rand(1, 1, size, size))).shape == (1, 1, size, size)


def test_unknown_network_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="model.network=vgg is unknown; it is one of small, rae32, rae64"):
        resolve_model(ModelConfig("vgg"), MNIST)


OWN = {"encoder": "a:B", "decoder": "a:C"}


@pytest.mark.parametrize(
    ("settings", "latent_norm", "refused"),
    [
        ({"norm": "none", "norm_eps": 1e-5}, True, "norm_eps"),
        ({"norm": "none", "norm_momentum": 0.2}, False, "norm_momentum"),
        ({"norm": "none", "norm_momentum": 0.2}, True, None),  # the latent's
        ({"norm_eps": 1e-5, "norm_momentum": 0.2}, False, None),
        (OWN | {"norm": "none"}, True, "norm"),
        (OWN | {"norm_eps": 1e-5}, True, "norm_eps"),
        ({"encoder": "a:B", "norm_eps": 1e-5}, False, None),  # the decoder's
    ],
)
def test_setting_of_norms_that_there_are_not_is_refused(settings, latent_norm, refused):
    if refused is None:
        resolve_model(ModelConfig(**settings), MNIST, latent_norm=latent_norm)
        return
    with pytest.raises(ValueError, match=rf"model\.{refused}=.* has no effect on a model without built-in batch norms"):
        resolve_model(ModelConfig(**settings), MNIST, latent_norm=latent_norm)


@pytest.mark.parametrize("network", NETWORKS)
def test_color_images_get_at_least_32_latent_dimensions_and_gray_ones_the_papers_16(network):
    size = {"rae64": 64}.get(network, 32)
    assert resolve_model(ModelConfig(network), (3, size, size)).latent_dim >= 32
    if network != "rae64":  # made for color
        assert resolve_model(ModelConfig(network), (1, size, size)).latent_dim == 16


def test_small_network_has_three_layers_each_way():
    model = built("small", MNIST)
    words = layers_of(model.encoder) + layers_of(model.decoder)
    assert sum(word.startswith("conv ") for word in words) >= 3
    assert sum(word.startswith("convT ") for word in words) >= 3


@pytest.mark.parametrize("network", NETWORKS)
def test_width_and_latent_dimension_are_those_of_the_configuration(network):
    with torch.device("meta"):
        model = built(network, CELEBA, width=5, latent_dim=7)
    encoder, decoder = layers_of(model.encoder), layers_of(model.decoder)
    kernel = NETWORKS[network].kernel
    assert encoder[0] == f"conv {kernel}x{kernel}/2 3->5" and encoder[3] == f"conv {kernel}x{kernel}/2 5->10"
    assert encoder[-1].endswith("->7") and decoder[0].startswith("dense 7->")
    assert model.latent_dim == 7


def test_norm_settings_reach_every_norm_and_the_latents_keeps_its_own_epsilon():
    model = built("rae32", MNIST, width=1, norm_momentum=0.25, norm_eps=0.5)
    norms = [layer for layer in model.modules() if isinstance(layer, GlobalBatchNorm) and layer is not model.latent_norm]
    assert len(norms) == 6 and {(norm.momentum, norm.eps) for norm in norms} == {(0.25, 0.5)}
    assert (model.latent_norm.momentum, model.latent_norm.eps, model.latent_norm.weight) == (0.25, LATENT_EPS, None)


def test_normed_latents_have_mean_zero_and_variance_one():
    torch.manual_seed(0)
    model = built("small", (1, 16, 16), width=4, latent_dim=5).double()
    latents = model.encode(torch.rand(64, 1, 16, 16, dtype=torch.float64))
    torch.testing.assert_close(latents.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    raw = model.encoder(torch.rand(64, 1, 16, 16, dtype=torch.float64)).var(0, correction=0)
    # The norm divides by the root of variance + epsilon, so the variance falls short of 1 by epsilon / variance.
    assert (latents.var(0, correction=0) - 1).abs().max() < 3 * LATENT_EPS / raw.min()


def test_latents_stay_float32_under_autocast():
    model = built("small", (1, 16, 16), width=4, latent_dim=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = torch.rand(8, 1, 16, 16)
        assert model.encoder(images).dtype == torch.bfloat16
        latents = model.encode(images)
    assert latents.dtype == torch.float32 and latents.unique().numel() > 8


@pytest.mark.parametrize("name", OBJECTIVES)
def test_initial_weights_depend_on_the_seed_alone(name):
    model = resolve_model(ModelConfig("small", width=4, latent_dim=5), MNIST)

    def state(seed: int, drawn_before: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(drawn_before)
        before = torch.get_rng_state()
        objective = build_objective(model, ObjectiveConfig(name), MNIST, seed)
        assert torch.equal(torch.get_rng_state(), before)  # and building changes no other draw
        return objective.state_dict()

    once, again, other = state(3, 10), state(3, 20), state(4, 10)
    assert once.keys() == again.keys() and all(torch.equal(once[key], again[key]) for key in once)
    drawn = [key for key in once if key.endswith(("weight", "original")) and once[key].ndim > 1]
    assert len(drawn) == 8 and not any(torch.equal(once[key], other[key]) for key in drawn)


def test_initial_weights_are_glorot_uniform_and_biases_zero_as_keras_defaults_are():
    torch.manual_seed(0)
    model = built("rae32", MNIST, width=16, latent_norm=False)
    checked = 0
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            kernel = math.prod(getattr(layer, "kernel_size", (1,)))
            both = sum(layer.weight.shape[:2])  # channels in plus channels out, in either order
            limit = math.sqrt(6 / (kernel * both))
            count = layer.weight.numel()
            # The largest of n uniform draws is 1 - 1/n of the limit on average; 256 draws at least.
            assert 0.95 * limit < layer.weight.abs().max() <= limit
            # The variance of a uniform density is limit^2/3, its estimate from n draws scatters by sqrt(0.8/n) of that.
            assert layer.weight.var().item() == pytest.approx(limit**2 / 3, rel=5 * math.sqrt(0.8 / count))
            assert layer.bias is None or not layer.bias.any()
            checked += 1
    assert checked == 9


class OwnEncoder(nn.Module):
    def __init__(self, *, image_shape, latent_dim, width, bias):
        super().__init__()
        self.seen = {"image_shape": image_shape, "latent_dim": latent_dim, "width": width, "bias": bias}
        self.head = nn.Linear(math.prod(image_shape), latent_dim, bias=bias)

    def forward(self, x):
        return self.head(x.flatten(1))


class OwnDecoder(nn.Module):
    def __init__(self, *, image_shape, latent_dim, width):
        super().__init__()
        self.seen = {"image_shape": image_shape, "latent_dim": latent_dim, "width": width}
        self.out = nn.Sequential(nn.Linear(latent_dim, math.prod(image_shape)), nn.Unflatten(1, image_shape), nn.Sigmoid())

    def forward(self, z):
        return self.out(z)


class LocallyNormedEncoder(OwnEncoder):
    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d, **arguments):
        super().__init__(**arguments)
        self.inner = nn.Sequential(nn.Identity(), norm(4))


class LocallyNormedDecoder(OwnDecoder):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.inner = nn.ModuleDict({"norm": nn.SyncBatchNorm(4)})


class UntrackedEncoder(LocallyNormedEncoder):
    def __init__(self, **arguments):
        super().__init__(partial(GlobalBatchNorm, track=False), **arguments)


class RowNormedEncoder(LocallyNormedEncoder):
    def __init__(self, **arguments):
        super().__init__(nn.LayerNorm, **arguments)


def own(class_: type) -> str:
    return f"{__name__}:{class_.__name__}"


@pytest.mark.parametrize("latent_norm", [True, False])
def test_own_networks_are_made_from_the_configuration(latent_norm):
    shape = (1, 5, 7)  # with both networks one's own, any size will do
    names = {"encoder": own(OwnEncoder), "decoder": own(OwnDecoder)}
    model = built("small", shape, latent_norm=latent_norm, width=9, latent_dim=3, **names)
    common = {"image_shape": shape, "latent_dim": 3, "width": 9}
    assert isinstance(model.encoder, OwnEncoder) and model.encoder.seen == common | {"bias": not latent_norm}
    assert isinstance(model.decoder, OwnDecoder) and model.decoder.seen == common
    assert model.decode(model.encode(torch.rand(4, *shape))).shape == (4, *shape)


def test_own_encoder_and_a_built_in_decoder_go_together_where_the_image_fits():
    model = built("small", (1, 16, 16), latent_dim=3, width=2, encoder=own(OwnEncoder))
    assert model.decode(model.encode(torch.rand(4, 1, 16, 16))).shape == (4, 1, 16, 16)
    with pytest.raises(ValueError, match="multiples of 8, got 15x15"):
        built("small", (1, 15, 15), encoder=own(OwnEncoder))


@pytest.mark.parametrize("key", ["encoder", "decoder"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_package:Class", "cannot be imported as package.module:Class"),
        ("json:NoSuchClass", "cannot be imported as package.module:Class"),
        ("json.JSONEncoder", "cannot be imported as package.module:Class"),  # no colon
        ("", "cannot be imported as package.module:Class"),
        (".mine:Encoder", "cannot be imported as package.module:Class"),
        ("json:JSONEncoder", "is not a class derived from torch.nn.Module"),
        ("torch.nn.functional:relu", "is not a class derived from torch.nn.Module"),
    ],
)
def test_names_that_are_no_network_are_errors_that_name_the_key(key, name, words):
    with pytest.raises(ValueError, match=f"^model.{key}={re.escape(name)} {words}"):
        built("small", (1, 16, 16), **{key: name})


@pytest.mark.parametrize(
    ("key", "class_", "layer"),
    [
        ("encoder", LocallyNormedEncoder, "'inner.1' is BatchNorm2d"),
        ("decoder", LocallyNormedDecoder, "'inner.norm' is SyncBatch"),
        ("encoder", UntrackedEncoder, "'inner.1' is a GlobalBatchNorm with track=False"),
    ],
)
def test_own_network_with_a_norm_that_pictures_and_ranks_cannot_share_is_refused(key, class_, layer):
    with pytest.raises(ValueError, match=f"model.{key}: layer {layer}"):
        built("small", (1, 16, 16), **{key: own(class_)})


def test_own_network_with_a_norm_of_each_row_is_not_refused():
    assert isinstance(built("small", (1, 16, 16), encoder=own(RowNormedEncoder)).encoder, RowNormedEncoder)
