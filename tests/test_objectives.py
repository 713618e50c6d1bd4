"""The losses on one process, from their parts; test_laws.py has them over ranks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from world_cases import OBJECTIVES as CASES
from world_cases import configured

from benchmarks.global_entropy import grouped
from eae_dist.config import Config, ModelConfig, ObjectiveConfig
from eae_dist.losses.entropy import knn_entropy
from eae_dist.model.autoencoder import LATENT_EPS
from eae_dist.numerics.keyed_random import derive_key, normal, row_keys
from eae_dist.objectives import OBJECTIVES, Objective, build_objective, orthonormal, resolve

SHAPE = (1, 16, 16)
PIXELS = 16 * 16
ROWS = 24


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def built(name: str, *settings: str, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> Objective:
    """A row of world_cases.OBJECTIVES, of width 4 and latent size 5."""
    config = configured("unread", name, *settings)
    return build_objective(config.model, config.objective, shape, seed)


def images(rows: int = ROWS, channels: int = 1) -> torch.Tensor:
    return torch.rand(rows, channels, 16, 16, generator=torch.Generator().manual_seed(1))


def everyone(rows: int = ROWS) -> torch.Tensor:
    return torch.ones(rows, dtype=torch.bool)


def loss_of(objective: Objective, x: torch.Tensor, first: torch.Tensor | None = None, key: int = 0) -> dict[str, torch.Tensor]:
    return objective(x, everyone(len(x)) if first is None else first, len(x), np.arange(len(x)), key)


def batch_normed(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(0)) / (x.var(0, correction=0) + LATENT_EPS).sqrt()


def sse_per_image(objective: Objective, x: torch.Tensor) -> float:
    return ((objective.autoencoder.decode(objective.autoencoder.encode(x)) - x).square().sum() / len(x)).item()


@pytest.mark.parametrize("weight", [0.0, 0.05, 3.0])
@pytest.mark.parametrize("options", [["objective.k=1"], ["objective.k=3"], ["objective.k=3", "objective.average_k=true"]])
def test_eae_is_squared_error_per_pixel_minus_weighted_entropy_per_dimension(weight, options):
    objective, x = built("eae", f"objective.entropy_weight={weight}", "objective.eps2=1e-3", *options), images()
    config = objective.config
    terms = loss_of(objective, x, key=0)
    entropy = knn_entropy(
        batch_normed(objective.autoencoder.encoder(x)), k=config.k, average_k=config.average_k, eps2=config.eps2
    )
    assert terms["entropy"].item() == pytest.approx(entropy.item(), rel=1e-9)
    expected = sse_per_image(objective, x) / PIXELS - weight * entropy.item() / 5
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["ae", "rae_gp", "eae", "eae_linear"])  # without noise or a state that moves
def test_reconstruction_is_squared_error_per_image_and_per_pixel_and_channel(name):
    config = configured("unread", name)
    config = replace(config, model=replace(config.model, width=2))
    objective = build_objective(config.model, config.objective, (3, 16, 16), 0)
    x = images(channels=3)
    terms = loss_of(objective, x, key=0)
    assert terms["reconstruction"].item() == pytest.approx(sse_per_image(objective, x), rel=1e-12)
    assert terms["reconstruction_per_pixel"].item() == pytest.approx(sse_per_image(objective, x) / (3 * PIXELS), rel=1e-12)


def test_ae_is_squared_error_alone_on_latents_without_a_norm():
    objective, x = built("ae"), images()
    assert objective.autoencoder.latent_norm is None
    terms = loss_of(objective, x, key=0)
    assert terms.keys() == {"loss", "reconstruction", "reconstruction_per_pixel"}
    assert terms["loss"].item() == pytest.approx(sse_per_image(objective, x) / PIXELS, rel=1e-12)
    torch.testing.assert_close(objective.autoencoder.encode(x), objective.autoencoder.encoder(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_loss_reaches_every_parameter(name):
    objective = built(name)
    loss_of(objective, images(), key=0)["loss"].backward()
    # A layer whose ReLUs were all off would have a gradient of exactly zero as well; none is, from these weights.
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.parameters())


@pytest.mark.parametrize("name", ["eae", "eae_linear", "eae_redrawn"])
def test_entropy_term_pulls_the_encoder_towards_more_entropy(name):
    objective, x = built(name, "objective.entropy_weight=5"), images()
    plain = built(name, "objective.entropy_weight=0")
    head, plain_head = objective.autoencoder.encoder.head.weight, plain.autoencoder.encoder.head.weight
    before = loss_of(objective, x, key=0)
    before["loss"].backward()
    loss_of(plain, x, key=0)["loss"].backward()
    assert "penalty" not in before and not before["entropy"].requires_grad
    # Against the gradient of the entropy's part alone; a step so short that the line is straight.
    with torch.no_grad():
        head -= 1e-5 * (head.grad - plain_head.grad)
    assert loss_of(objective, x, key=0)["entropy"] > before["entropy"]


@pytest.mark.parametrize("name", ["eae", "eae_linear", "eae_redrawn"])
def test_second_copy_of_a_sample_counts_in_the_reconstruction_but_is_no_neighbor(name):
    objective = built(name)
    x = images()
    x[20:] = x[:4]
    first = torch.arange(ROWS) < 20
    masked, unmasked = loss_of(objective, x, first), loss_of(objective, x, key=0)
    assert masked["reconstruction"].item() == pytest.approx(sse_per_image(objective, x), rel=1e-12)
    assert masked["reconstruction"].item() == unmasked["reconstruction"].item()
    features = objective.autoencoder.encode(x)
    if name != "eae":  # statistics over all rows, copies included
        features = objective.map_norm(features @ (objective.map if name == "eae_linear" else orthonormal(5, 3, 0)))
    assert masked["entropy"].item() == pytest.approx(knn_entropy(features[:20]).item(), rel=1e-12)
    assert int(masked["floored_pairs"]) == 0 and int(unmasked["floored_pairs"]) == 8
    assert masked["entropy"] > unmasked["entropy"] + 1  # eight of 24 distances at the floor cost several nats


@pytest.mark.parametrize("first", [None, torch.arange(ROWS) % 6 < 5], ids=["no copies", "copies"])
def test_entropy_of_the_benchmarks_groups_is_the_mean_over_neighboring_rows_and_of_all_rows_in_validation(monkeypatch, first):
    monkeypatch.setitem(OBJECTIVES, "eae", grouped(4))
    objective, x = built("eae"), images()
    latents = batch_normed(objective.autoencoder.encoder(x))
    keep = everyone() if first is None else first
    parts = [knn_entropy(z[valid]) for z, valid in zip(latents.chunk(4), keep.chunk(4), strict=True)]
    found = objective(x, first, ROWS, np.arange(ROWS), 0)
    assert found["entropy"].item() == pytest.approx(torch.stack(parts).mean().item(), rel=1e-12)
    objective.eval()
    validated = objective.entropy(latents, first, ROWS, np.arange(ROWS), 0)
    assert validated["entropy"].item() == pytest.approx(knn_entropy(latents[keep]).item(), rel=1e-12)


@pytest.mark.parametrize(("d", "m"), [(5, 5), (5, 3), (64, 64), (7, 1)])
def test_map_has_orthonormal_columns(d, m):
    matrix = orthonormal(d, m, 0)
    assert matrix.shape == (d, m) and matrix.dtype == torch.float64
    torch.testing.assert_close(matrix.T @ matrix, torch.eye(m), rtol=0, atol=1e-13)


def test_map_is_uniform_on_the_orthogonal_group():
    # E[M_ij] = 0 and E[M_ij^2] = 1/d for every entry; without the signs of Mezzadri the first row of QR's q is one-sided.
    draws = torch.stack([orthonormal(3, 3, seed) for seed in range(2000)])
    # Standard deviations of a mean of 2,000: 0.58 / sqrt(2000) = 0.013 and, as Var[M^2] = 4/45, 0.0067. Five of each.
    assert draws.mean(0).abs().max() < 0.065
    assert (draws.square().mean(0) - 1 / 3).abs().max() < 0.034


def test_fixed_map_follows_from_the_seed_and_is_saved_with_the_model():
    one, same, other = (built("eae_linear", "objective.map_dim=3", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.state_dict()["map"], orthonormal(5, 3, 1))
    assert torch.equal(same.map, one.map) and not torch.equal(other.map, one.map)
    other.load_state_dict(one.state_dict())
    x = images()
    assert torch.equal(loss_of(other, x, key=0)["entropy"], loss_of(one, x, key=0)["entropy"])
    assert torch.equal(loss_of(one, x, key=0)["entropy"], loss_of(one, x, key=9)["entropy"])
    assert not any(p is one.map for p in one.parameters())  # not learned


def test_redrawn_map_follows_from_the_key_of_the_batch_and_is_not_saved():
    objective = built("eae_redrawn")
    assert "map" not in objective.state_dict()

    def entropy(key):
        return loss_of(objective, images(), key=key)["entropy"].item()

    assert entropy(7) == entropy(7)
    assert len({entropy(key) for key in range(5)}) == 5


@pytest.mark.parametrize(("name", "matrix"), [("eae_linear", 1), ("eae_redrawn", 4)])
def test_eae_linear_takes_the_entropy_of_the_batch_normed_image_of_the_latents(name, matrix):
    settings = ["objective.map_dim=3", "objective.k=2", "objective.entropy_weight=0.7"]
    objective, x = built(name, *settings, seed=1), images()
    terms = loss_of(objective, x, key=4)
    z = batch_normed(objective.autoencoder.encoder(x))
    entropy = knn_entropy(batch_normed(z @ orthonormal(5, 3, matrix)), k=2).item()
    assert terms["entropy"].item() == pytest.approx(entropy, rel=1e-9)
    # Per dimension of the image, not of the latent.
    assert terms["loss"].item() == pytest.approx(sse_per_image(objective, x) / PIXELS - 0.7 * entropy / 3, rel=1e-9)


def test_eae_linear_on_a_rotation_of_all_dimensions_differs_from_eae_by_the_second_norm_only():
    # A rotation moves no distance; what is left is that the rotated latents are whitened per dimension again.
    x = images()
    objective = built("eae_linear")
    assert objective.map_dim == 5
    z = objective.autoencoder.encode(x)
    assert knn_entropy(z @ objective.map).item() == pytest.approx(knn_entropy(z).item(), rel=1e-9)
    assert loss_of(objective, x, key=0)["entropy"].item() != pytest.approx(knn_entropy(z).item(), rel=1e-6)


@pytest.mark.parametrize("map", ["fixed", "redrawn"])
def test_map_to_more_dimensions_than_the_latent_is_an_error_that_names_both_keys(map):
    with pytest.raises(ValueError, match="objective.map_dim=6 must be at most model.latent_dim=5"):
        built("eae_linear", f"objective.map={map}", "objective.map_dim=6")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_of_the_table_gives_finite_scalars_by_name(name):
    objective = built(name)
    assert type(objective) is OBJECTIVES[name]
    terms = loss_of(objective, images())
    assert {"loss", "reconstruction", "reconstruction_per_pixel", *objective.penalties} <= terms.keys()
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    assert (objective.autoencoder.latent_norm is not None) == objective.latent_norm
    assert (objective.autoencoder.encoder.head.bias is None) == objective.latent_norm
    # The formula that is said at the start is the loss.
    weights = [float(part.split()[0]) for part in objective.formula().split(" + ")]
    values = [terms[name].item() for name in ("reconstruction", *objective.penalties)]
    assert sum(w * v for w, v in zip(weights, values, strict=True)) == pytest.approx(terms["loss"].item(), rel=1e-3)


def test_cases_take_in_every_row():
    assert set(OBJECTIVES) == {name for name in CASES if name != "eae_redrawn"}


# What each row adds to the squared error, written down once more; x: images, z: latents, c: the settings.


def kl(objective, x, key):
    mean, log_sigma = objective.latents(objective.autoencoder.encoder_output(x))
    posterior = torch.distributions.Normal(mean, log_sigma.exp())
    return torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()


def mmd(objective, x, key):
    z = objective.autoencoder.encode(noisy(x, 0.05, key))
    prior = normal(row_keys(derive_key(key, 1), np.arange(len(x))), 5)
    total = 0.0
    for i in range(ROWS):
        for j in range(ROWS):
            for scale in (0.1, 0.2, 0.5, 1, 2, 5, 10):
                c = 2 * 5 * scale
                kernel = lambda a, b: c / (c + (a - b).square().sum())  # noqa: B023, E731
                if i != j:
                    total = total + (kernel(z[i], z[j]) + kernel(prior[i], prior[j])) / (ROWS * (ROWS - 1))
                total = total - 2 * kernel(z[i], prior[j]) / ROWS**2
    return total


def noisy(x, sigma, key):
    draws = normal(row_keys(derive_key(key, 2), np.arange(len(x))), x[0].numel()).view_as(x)
    return x + (sigma * draws).clamp(-sigma, sigma)


def decoder_l2(objective, x, key):
    kernels = [p for name, p in objective.autoencoder.decoder.named_parameters() if name.startswith("layers") and p.ndim == 4]
    assert len(kernels) == 3
    return sum(p.square().sum() for p in kernels)


def gradient_penalty(objective, x, key):
    z = objective.autoencoder.encode(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective.autoencoder.decode(z).square().sum(), z)
    return gradient.square().mean()


def latent_l2(objective, x, key):
    return objective.autoencoder.encode(x).square().mean()


def epps_pulley(objective, x, key):
    t = torch.linspace(-5, 5, 17)
    characteristic = torch.exp(1j * (objective.autoencoder.encode(x) @ projected_on(7, key).T)[..., None] * t).mean(0)
    error = (characteristic - torch.exp(-t.square() / 2)).abs().square() * torch.exp(-t.square() / 2)
    return torch.trapezoid(error, t).mean()


def sliced_wasserstein(objective, x, key):
    quantiles = torch.special.ndtri((torch.arange(1, ROWS + 1) - 3 / 8) / (ROWS + 1 / 4))
    return ((objective.autoencoder.encode(x) @ projected_on(7, key).T).sort(0).values - quantiles[:, None]).square().mean()


def projected_on(m, key):
    draws = normal(row_keys(derive_key(key, 4), np.arange(m)), 5)
    return draws / draws.norm(dim=1, keepdim=True)


ADDED = {
    "ae": {},
    "ae_l2": {decoder_l2: 1e-2},
    "rae": {latent_l2: 0.1},
    "rae_l2": {latent_l2: 0.1, decoder_l2: 1e-2},
    "rae_gp": {latent_l2: 0.1, gradient_penalty: 1e-4},
    "vae": {kl: 0.3},
    "cv_vae": {kl: 0.3},
    "two_stage_vae": {kl: 0.3},
    "wae": {mmd: 0.5},
    "sigreg": {epps_pulley: 0.5},
    "swae": {sliced_wasserstein: 0.5},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ADDED)
def test_loss_is_that_of_the_official_code(name, channels):
    objective, x = built(name, shape=(channels, 16, 16)), images(channels=channels)
    terms = loss_of(objective, x, key=3)
    model = objective.autoencoder
    if kl in ADDED[name]:
        mean, log_sigma = objective.latents(objective.autoencoder.encoder_output(x))
        z = mean + log_sigma.exp() * normal(row_keys(derive_key(3, 0), np.arange(ROWS)), 5)
        scale = 1 / channels
    else:
        z = model.encode(noisy(x, 0.05, 3) if name == "wae" else x)
        scale = 1 / (PIXELS * channels)
    expected = scale * (model.decode(z) - x).square().sum() / ROWS
    for penalty, weight in ADDED[name].items():
        value = penalty(objective, x, 3)
        assert terms[penalty.__name__].item() == pytest.approx(value.item(), rel=1e-9)
        expected = expected + weight * value
    assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("network", "penalized"), [("small", False), ("rae32", False), ("rae64", True)])
def test_l2_penalty_takes_in_the_dense_layer_of_celebas_decoder_alone(network, penalized):
    objective = built("ae_l2", f"model.network={network}", shape=(3, 64, 64))
    decoder = objective.autoencoder.decoder
    kernels = [layer.weight for layer in decoder.layers if hasattr(layer, "stride")] + [decoder.dense.weight] * penalized
    expected = sum(kernel.square().sum() for kernel in kernels)
    terms = loss_of(objective, torch.rand(4, 3, 64, 64))
    assert terms["decoder_l2"].item() == pytest.approx(expected.item(), rel=1e-9)


def test_deviation_of_a_vae_is_bounded_and_that_of_a_cv_vae_is_set():
    objective, x = built("vae"), images()
    objective.autoencoder.encoder.head.weight.data *= 1e4
    assert objective.latents(objective.autoencoder.encoder_output(x))[1].abs().max().item() == pytest.approx(5)
    assert objective.autoencoder.encoder.head.out_features == 10
    objective = built("cv_vae", "objective.sigma=0.7")
    assert objective.latents(objective.autoencoder.encoder_output(x))[1].exp().unique().tolist() == pytest.approx([0.7])


def test_spectral_norm_divides_every_kernel_by_its_largest_singular_value():
    objective = built("rae_sn")
    for _ in range(50):  # of the power iteration
        loss_of(objective, images())
    objective.eval()
    kernels = [
        layer.weight.flatten(1)
        for layer in objective.autoencoder.modules()
        if isinstance(layer, torch.nn.Conv2d | torch.nn.ConvTranspose2d | torch.nn.Linear)
    ]
    assert len(kernels) == 8
    # The iteration converges as (s2/s1)^2 does; random kernels have s2/s1 up to 0.97.
    assert [torch.linalg.matrix_norm(kernel, 2).item() for kernel in kernels] == pytest.approx([1] * 8, abs=0.02)


def test_reconstruction_weight_replaces_the_row_s_own():
    x = images()
    own, set_by_hand = built("wae"), built("wae", "objective.reconstruction_weight=0.05")
    a, b = loss_of(own, x), loss_of(set_by_hand, x)
    difference = a["reconstruction"].item() * (0.05 - 1 / PIXELS)
    assert b["loss"].item() - a["loss"].item() == pytest.approx(difference, rel=1e-9)


@pytest.mark.parametrize("setting", ["objective.k=2", "objective.kl_weight=1", "objective.map_dim=2"])
def test_setting_that_the_objective_does_not_read_is_an_error(setting):
    with pytest.raises(ValueError, match=f"{setting.split('=')[0]}=.* has no effect with objective.name=ae, which reads"):
        built("ae", setting)


def test_unknown_objective_is_an_error_that_lists_the_known():
    config = replace(Config(), objective=ObjectiveConfig(name="eea"))
    with pytest.raises(ValueError, match=f"objective.name=eea is unknown; it is one of {', '.join(OBJECTIVES)}"):
        resolve(config, SHAPE)


def test_resolved_configuration_states_what_follows_from_the_data():
    config = replace(Config(), model=ModelConfig("rae32"))
    resolved = resolve(config, (3, 32, 32))
    assert (resolved.data.lanes, resolved.model.width, resolved.model.latent_dim) == (config.train.global_batch, 128, 128)
    assert resolve(resolved, (3, 32, 32)) == resolved
    chosen = replace(resolved, data=replace(resolved.data, lanes=4), model=ModelConfig("rae32", width=3, latent_dim=2))
    assert resolve(chosen, (3, 32, 32)) == chosen


@pytest.mark.parametrize("name", [name for name in CASES if name != "rae_gp"])  # whose batch norms couple a batch in training
def test_terms_of_blocks_put_together_are_those_of_the_whole(name):
    objective, x = built(name).eval(), images()
    with torch.no_grad():
        whole = loss_of(objective, x)
        parts = zip(x.split(9), np.split(np.arange(ROWS), (9, 18)), strict=True)
        blocks = [objective.per_row(part, numbers, 0) for part, numbers in parts]
        per_row = {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}
        parts = objective.terms(per_row, everyone(), ROWS, np.arange(ROWS), 0)
    assert whole.keys() == parts.keys()
    assert {name: term.item() for name, term in whole.items()} == pytest.approx({name: t.item() for name, t in parts.items()})
