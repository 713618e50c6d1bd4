"""The index of latents: what a search finds against a comparison with every row, on any number of ranks."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from world_search import ROWS, latents, queries

from eae_dist.latent import index_part
from eae_dist.latent.index import KINDS, DamagedIndex, LatentIndex, choose
from eae_dist.latent.neighbor_statistics import compare_distances, entropy_of_distances, nearest_others, vote
from eae_dist.losses.entropy import knn_entropy
from eae_dist.numerics.json_files import read_json, sealed

RANKS = (1, 2, 3, 4)


def compared(rows: np.ndarray, asked: np.ndarray, metric: str = "l2") -> np.ndarray:
    """Squared distances or inner products of all queries and rows, in float64."""
    rows, asked = rows.astype(np.float64), asked.astype(np.float64)
    if metric == "cosine":
        rows, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (rows, asked))
    return (asked[:, None] * rows if metric == "inner_product" else np.square(asked[:, None] - rows)).sum(2)


def by_comparison(rows: np.ndarray, asked: np.ndarray, k: int, metric: str = "l2") -> tuple[np.ndarray, np.ndarray]:
    """Squared distances or inner products in float64 and ids, nearest first, equals by id."""
    values = compared(rows, asked, metric)
    ids = np.argsort(-values if metric == "inner_product" else values, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(values, ids, 1), ids


@pytest.fixture(scope="module")
def clustered() -> tuple[np.ndarray, np.ndarray]:
    """12,000 rows in 40 clusters, and 100 queries of the same."""
    generator = np.random.default_rng(0)
    centers = 3 * generator.normal(size=(40, 7))
    rows, asked = (centers[generator.integers(40, size=n)] + generator.normal(size=(n, 7)) for n in (12_000, 100))
    return rows.astype(np.float32), asked.astype(np.float32)


@pytest.mark.parametrize("k", [1, 7, ROWS])
def test_exact_search_finds_what_comparing_with_every_row_finds(k):
    squared, ids = LatentIndex.build(latents(), "flat").search(queries(), k)
    expected, nearest = by_comparison(latents(), queries(), k)
    assert squared.dtype == np.float32 and ids.dtype == np.int64
    np.testing.assert_allclose(squared, expected, rtol=1e-5, atol=1e-12)
    assert (ids == nearest).mean() > 0.999  # rounding may exchange two that are nearly as near
    assert (ids[0] == nearest[0]).all()  # 20 equal rows, by id


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("k", [1, 7, ROWS])
def test_exact_search_by_another_metric_finds_what_comparing_with_every_row_finds(k, metric):
    values, ids = LatentIndex.build(latents(), "flat", metric=metric).search(torch.from_numpy(queries()), k)
    expected, nearest = by_comparison(latents(), queries(), k, metric)
    if metric == "inner_product":  # float64 by another order of the sum, on both sides
        np.testing.assert_allclose(values, expected, rtol=1e-12, atol=1e-12)
        assert values.dtype == torch.float64 and np.array_equal(ids, nearest)
    else:  # rows of norm 1 in float32: a squared distance of 4 at most
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
        assert values.dtype == torch.float32 and (ids.numpy() == nearest).mean() > 0.99


def test_rows_whose_squares_are_too_small_for_float32_have_a_direction():
    rows = np.float32(1e-30) * latents()
    values, ids = LatentIndex.build(rows, metric="cosine").search(rows[200:300], 1)
    assert (values < 1e-12).all() and (ids[:, 0] == np.arange(200, 300)).all()


@pytest.mark.parametrize("asked", [3, 300])
def test_inner_products_that_float32_cannot_tell_apart_are_told_apart(asked):
    rows = np.full((2_000, 4), 1_000, np.float32)
    rows[:, 0] += np.random.default_rng(0).permutation(2_000).astype(np.float32) * 2**-12
    asking = np.random.default_rng(1).uniform(1, 2, size=(asked, 4)).astype(np.float32)
    values, ids = LatentIndex.build(rows, metric="inner_product").search(asking, 3)
    expected, nearest = by_comparison(rows, asking, 3, "inner_product")
    np.testing.assert_allclose(values, expected, rtol=1e-14)
    assert np.array_equal(ids, nearest)


@pytest.mark.parametrize("asked", [3, 300])  # one by one, and in products
@pytest.mark.parametrize("offset", [0, 3_000])
def test_exact_search_is_exact_far_from_the_origin(offset, asked):
    generator = np.random.default_rng(0)
    rows, asking = (generator.normal(offset, 1, size=(n, 16)).astype(np.float32) for n in (2_000, asked))
    squared, ids = LatentIndex.build(rows, "flat").search(asking, 5)
    expected, nearest = by_comparison(rows, asking, 5)
    np.testing.assert_allclose(squared, expected, rtol=1e-5)
    assert (ids == nearest).mean() > 0.999


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_exact_search_is_exact_at_any_scale(scale):
    squared, ids = LatentIndex.build(latents() * np.float32(scale), "flat").search(queries() * np.float32(scale), 7)
    expected, nearest = by_comparison(latents() * np.float32(scale), queries() * np.float32(scale), 7)
    np.testing.assert_allclose(squared, expected, rtol=1e-5, atol=1e-12 * scale**2)
    assert (ids == nearest).mean() > 0.999  # as above


def test_many_copies_are_compared_a_few_at_a_time(monkeypatch):
    rows, compared = np.repeat(latents()[:3], 300, 0), []
    distances = index_part._squared_distances
    monkeypatch.setattr(index_part, "CANDIDATES", 2_000)
    monkeypatch.setattr(index_part, "_squared_distances", lambda q, x, ids: compared.append(ids.size) or distances(q, x, ids))
    squared, ids = LatentIndex.build(rows, "flat").search(rows, 2)
    assert (squared == 0).all() and (ids == 300 * (np.arange(900)[:, None] // 300) + [0, 1]).all()
    assert max(compared) <= 2_000


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_search_over_ranks_is_that_of_one_index_bit_for_bit(world, ranks):
    one, several = (world(w)["exact_search"] for w in (1, ranks))
    expected = LatentIndex.build(latents(), "flat")
    for k in one["built"]:
        for mine, theirs, here in zip(one["built"][k], several["built"][k], expected.search(queries(), k), strict=True):
            assert torch.equal(mine, theirs) and np.array_equal(mine, here)
    for name in ("saved", "saved by two"):
        assert all(torch.equal(a, b) for a, b in zip(several[name], one["built"][7], strict=True))


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("ranks", RANKS)
def test_search_by_another_metric_over_ranks_is_that_of_one_index_bit_for_bit(world, ranks, metric):
    got, expected = world(ranks)["search_by_metric"][metric], LatentIndex.build(latents(), "flat", metric=metric)
    for k, of_k in got["built"].items():
        assert all(np.array_equal(mine, here) for mine, here in zip(of_k, expected.search(queries(), k), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got["saved"], got["built"][7], strict=True))
    assert all(np.array_equal(mine, here) for mine, here in zip(got["cells"], expected.search(queries(), 5), strict=True))


@pytest.mark.parametrize("ranks", RANKS)
def test_embeddings_in_files_are_read_by_runs_and_searched_as_one(world, ranks):
    expected = LatentIndex.build(latents(), "flat").search(queries(), 7)
    for of_source in world(ranks)["embeddings"]["read"].values():
        assert of_source["first"] == [ROWS * share // ranks for share in range(ranks)]
        assert np.array_equal(of_source["rows"], latents())
        assert all(np.array_equal(mine, here) for mine, here in zip(of_source["found"], expected, strict=True))


@pytest.mark.parametrize("ranks", RANKS)
def test_merged_file_of_all_ranks_has_the_same_neighbors_for_faiss_alone(world, ranks):
    for name, got in world(ranks)["embeddings"]["merged"].items():
        metric = name.split()[1]
        exact = LatentIndex.build(latents(), "flat", metric=metric).search(queries(), 7)
        every = compared(latents(), queries(), metric)
        if name.startswith("flat"):
            assert all(np.array_equal(mine, here) for mine, here in zip(got["ours"], exact, strict=True)), name
        values, ids = (x.numpy() for x in got["alone"])
        assert (np.diff(np.sort(ids, axis=1)) > 0).all(), name
        # FAISS alone has an error of (d + 2) 2^-24 (|q| + |x|)^2 at norms of up to 93, and so exchanges rows that are as near.
        for theirs in (values, np.take_along_axis(every, ids, 1)):
            np.testing.assert_allclose(theirs, exact[0], rtol=0, atol=2e-2 if metric != "cosine" else 2e-6, err_msg=name)


@pytest.mark.parametrize("ranks", RANKS)
def test_cells_over_ranks_find_the_share_that_is_asked_for_and_all_that_there_are(world, ranks):
    got = world(ranks)["approximate_search"]
    exact, _ = by_comparison(latents(), queries(), ROWS)
    squared, ids = (x.numpy() for x in got["found"])
    share = (squared <= exact[:, 4:5] * (1 + 1e-5)).mean()
    assert 0.9 <= got["share"] and share == pytest.approx(got["share"], abs=0.01)
    np.testing.assert_allclose(squared, np.take_along_axis(unordered(), ids, 1), rtol=1e-5, atol=1e-12)
    assert (np.sort(got["everything"][1], axis=1) == np.arange(ROWS)).all()


def unordered() -> np.ndarray:
    return compared(latents(), queries())


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_wrong_on_one_rank_is_said_on_all(world, ranks):
    said = world(ranks)["search_errors"]
    for name, words in {
        "queries": "queries are not finite",
        "dimensions": "expected queries [rows, 6], got float32 (50, 4)",
        "k": f"k={ROWS + 1} must be a whole number" if ranks == 1 else "",
        "rows": "900 of 900 latents are not finite",
        "zero rows": "900 of 900 latents are zero and have no direction",
        "unwritable": "/proc/nowhere",
    }.items():
        assert len(said[name]) == ranks and all(text and words in text for text in said[name]), (name, said[name])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_tuned_saved_and_opened_again(kind, clustered, tmp_path):
    rows, asked = clustered
    index = LatentIndex.build(rows, kind, about={"of": "clusters"})
    share = index.tune(asked[:50], 0.95)
    squared, ids = index.search(asked[50:], 10)
    _, nearest = by_comparison(rows, asked[50:], 10)
    found = np.mean([len(set(a) & set(b)) for a, b in zip(ids, nearest, strict=True)]) / 10
    assert share >= 0.95 and found > 0.85
    if kind == "flat":
        assert share == found == 1 and index.effort is None
    index.save(tmp_path / "index")
    opened = LatentIndex.load(tmp_path / "index")
    assert (opened.kind, opened.n, opened.d, opened.effort, opened.about) == (kind, 12_000, 7, index.effort, {"of": "clusters"})
    maps = Path("/proc/self/maps")
    if maps.is_file():  # on Linux
        mapped = "part-*.npy" if kind == "ivf_pq" else "part-*"  # FAISS reads a CPU's codes
        assert all(f"{tmp_path}/index/{path.name}" in maps.read_text() for path in (tmp_path / "index").glob(mapped))
    again = opened.search(torch.from_numpy(asked[50:]), 10)
    assert np.array_equal(again[0], squared) and np.array_equal(again[1], ids) and isinstance(again[1], torch.Tensor)
    # Whatever found them, distances are those of the rows.
    np.testing.assert_allclose(squared, np.square(asked[50:, None].astype(float) - rows[ids]).sum(2), rtol=1e-5)


def test_tuning_takes_no_more_effort_than_it_needs(clustered):
    rows, asked = clustered
    index = LatentIndex.build(rows, "ivf_flat")
    efforts = {}
    for recall in (0.5, 0.9, 0.999):
        assert index.tune(asked, recall) >= recall
        efforts[recall] = index.effort
    assert efforts[0.5] < efforts[0.9] < efforts[0.999]


def test_recall_that_cannot_be_reached_is_said(clustered, caplog, monkeypatch):
    rows, asked = clustered
    index = LatentIndex.build(rows, "ivf_flat")
    monkeypatch.setattr(index, "_set_effort", lambda effort: LatentIndex._set_effort(index, 1))
    assert index.tune(asked, 1.0) < 1
    assert "recall=1.0 is not reached: ivf_flat finds 0." in caplog.text


@pytest.mark.parametrize(
    ("rows", "recall", "memory", "kind", "why"),
    [
        (100_000, 0.95, 10**9, "flat", "few enough"),
        (1_000_000, 1.0, 10**9, "flat", "exact"),
        (1_000_000, 0.95, 10**9, "ivf_flat", "take 264,000,000 bytes, which fit into 1,000,000,000"),
        (1_000_000, 0.95, 10**8, "ivf_pq", "more than 100,000,000; their codes take 40,000,000"),
    ],
)
def test_kind_is_chosen_by_rows_memory_and_recall_and_says_why(rows, recall, memory, kind, why):
    chosen = choose(rows, 64, recall, memory)
    assert chosen.kind == kind and why in chosen.reason


def test_index_of_small_sets_is_exact_by_itself():
    index = LatentIndex.build(latents())
    assert (index.kind, index.n, index.d) == ("flat", ROWS, 6) and "few enough" in index.reason


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LatentIndex.build(latents()[:0]), "an index needs latents"),
        (lambda: LatentIndex.build(latents()[0]), r"expected latents \[rows, dimensions\], got float32 \(6,\)"),
        (lambda: LatentIndex.build(latents() * np.nan), "900 of 900 latents are not finite"),
        (
            lambda: LatentIndex.build(latents(), "lsh"),
            "kind=lsh is unknown; it is auto or one of flat, ivf_flat, ivf_pq, hnsw",
        ),
        (lambda: LatentIndex.build(latents(), "ivf_pq"), "kind=ivf_pq needs 9,984 latents on a rank, got 900; take flat"),
        (lambda: LatentIndex.build(latents(), metric="dot"), "metric=dot is unknown; it is one of l2, cosine, inner_product"),
        (lambda: LatentIndex.build(latents() * 0, metric="cosine"), "900 of 900 latents are zero and have no direction"),
        (lambda: LatentIndex.build(latents(), metric="cosine").search(queries() * 0, 1), "50 of 50 queries are zero and have no"),
        (
            lambda: nearest_others(LatentIndex.build(latents(), metric="inner_product"), latents(), 0),
            "index.metric=inner_product has no distances between rows; take index.metric=l2 or cosine",
        ),
        (lambda: LatentIndex.build(latents(), recall=0), r"recall=0 must lie in \(0, 1\]"),
        (lambda: LatentIndex.build(latents() * np.float32(1e20)), "900 of 900 latents are not finite or have .* 4.6e\\+18"),
        (lambda: LatentIndex.build(latents()).search(queries() + np.float32(2e18), 1), "50 of 50 queries are not finite or have"),
        (lambda: LatentIndex.build(latents()).search(queries(), 0), "k=0 must be a whole number from 1 to the 900 rows"),
        (lambda: LatentIndex.build(latents()).search(queries(), 901), "k=901 must be"),
        (lambda: LatentIndex.build(latents()).search(queries(), True), "k=True must be"),
        (lambda: LatentIndex.build(latents()).search(queries()[:, :5], 1), r"expected queries \[rows, 6\], got .* \(50, 5\)"),
        (lambda: LatentIndex.build(latents()).search(queries().astype(str), 1), "expected queries"),
        (lambda: LatentIndex.build(latents()).tune(queries()[:0]), "needs queries"),
        (lambda: nearest_others(LatentIndex.build(latents()[:1]), latents()[:1], 0), "at least 2 rows"),
    ],
)
def test_wrong_input_is_refused_with_what_was_wanted(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_no_queries_have_no_neighbors():
    squared, ids = LatentIndex.build(latents()).search(queries()[:0], 3)
    assert squared.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_damage_of_a_saved_index_is_found_and_named(kind, tmp_path):
    LatentIndex.build(latents(), kind).save(tmp_path / "whole")
    files = [path.name for path in (tmp_path / "whole").iterdir()]
    assert len(files) == (2 if kind == "flat" else 3)
    for name in files:
        for damage in ("flip", "cut", "remove"):
            copy = shutil.copytree(tmp_path / "whole", tmp_path / f"{kind}-{name}-{damage}")
            data = bytearray((copy / name).read_bytes())
            data[len(data) // 2] ^= 1
            (copy / name).write_bytes(data if damage == "flip" else data[: len(data) // 2])
            if damage == "remove":
                (copy / name).unlink()
            if name == "index.json" and damage == "flip":
                continue  # it has no checksum: a changed letter may still be JSON
            with pytest.raises(FileNotFoundError if (name, damage) == ("index.json", "remove") else DamagedIndex, match=name):
                LatentIndex.load(copy)


def test_index_that_could_not_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    first = LatentIndex.build(latents(), "ivf_flat")
    first.save(tmp_path / "index")

    def full(*_):
        raise RuntimeError("Error in fwrite: No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(OSError, match=r"the index in .* could not be written: .*No space left"):
        LatentIndex.build(latents()[:300], "ivf_flat").save(tmp_path / "index")
    assert LatentIndex.load(tmp_path / "index").n == ROWS
    monkeypatch.undo()
    LatentIndex.build(latents()[:300], "ivf_flat").save(tmp_path / "index")
    assert LatentIndex.load(tmp_path / "index").n == 300
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_index_that_several_save_at_once_is_that_of_one_of_them(tmp_path):
    indexes = [LatentIndex.build(latents()[:count]) for count in (300, 400, 500, 600)]

    def save(index: LatentIndex) -> None:
        for _ in range(5):
            index.save(tmp_path / "index")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, indexes))
    assert LatentIndex.load(tmp_path / "index").n in (300, 400, 500, 600)
    assert [path.name for path in tmp_path.iterdir()] == ["index"]


def test_index_of_a_later_version_is_refused(tmp_path):
    LatentIndex.build(latents()).save(tmp_path / "index")
    described = read_json(tmp_path / "index" / "index.json", {}, "")
    (tmp_path / "index" / "index.json").write_text(sealed(described | {"version": 9}))
    with pytest.raises(DamagedIndex, match="version 9, this program reads version 1"):
        LatentIndex.load(tmp_path / "index")


def test_nearest_other_row_of_a_copy_is_another_copy():
    squared, ids = nearest_others(LatentIndex.build(latents()), latents(), 0)
    assert (ids != np.arange(ROWS)).all()
    copies = [3, *range(100, 110), 370, 371, *range(500, 507)]
    assert (squared[copies] == 0).all() and set(ids[copies]) <= set(copies)
    distances = unordered_others()
    np.testing.assert_allclose(squared, distances.min(1), rtol=1e-5, atol=1e-12)


def unordered_others() -> np.ndarray:
    rows = latents().astype(np.float64)
    distances = np.square(rows[:, None] - rows[None]).sum(2)
    np.fill_diagonal(distances, np.inf)
    return distances


def test_samples_that_copy_are_told_from_samples_that_do_not():
    generator = np.random.default_rng(0)
    query = generator.normal(2, 0.3, 400)
    same, copies = generator.normal(2, 0.3, 300), generator.normal(0.5, 0.3, 300)
    honest, copied = compare_distances(same, query), compare_distances(copies, query)
    assert abs(honest["sample_nearer"] - 0.5) < 0.05 and abs(honest["z"]) < 3 and honest["ks_p"] > 0.001
    assert copied["sample_nearer"] > 0.99 and copied["z"] > 15 and copied["ks"] > 0.9
    pairs = (copies[:, None] < query[None]).mean()
    assert copied["sample_nearer"] == pytest.approx(pairs, abs=1e-12)
    assert compare_distances(np.ones(5), np.ones(7))["z"] == 0


def test_vote_is_for_the_commonest_label_and_of_equals_for_the_nearer():
    labels = np.array([[1, 2, 2, 3, 3], [4, 5, 5, 5, 4], [7, 8, 9, 1, 2]])
    assert vote(labels).tolist() == [2, 5, 7]


def test_entropy_of_gaussian_draws_is_near_the_gaussian_and_copies_are_left_out():
    z = np.random.default_rng(0).normal(size=(4000, 3)).astype(np.float32)
    squared, _ = nearest_others(LatentIndex.build(z), z, 0)
    found = entropy_of_distances(np.sqrt(squared), 3)
    assert found["gaussian"] == pytest.approx(1.5 * np.log(2 * np.pi * np.e)) and found["without"] == 0
    assert found["nats"] == pytest.approx(found["gaussian"], abs=0.1)
    assert entropy_of_distances(np.array([0.0, 1.0, 1.0]), 3)["without"] == 1
    in_training = knn_entropy(torch.from_numpy(z).double(), eps2=1e-30)
    assert found["nats"] == pytest.approx(float(in_training), abs=1e-4)
