"""Search on a GPU: which indexes are copied to it, with which options, and when the CPU takes over.

Without a GPU a stand-in takes the place of FAISS' GPU indexes. It searches on the CPU and refuses what GpuIndexFlat,
GpuIndexIVFFlat and GpuIndexIVFPQ of FAISS 1.15 refuse.
"""

import logging

import faiss
import numpy as np
import pytest
import torch

from eae_dist.latent import gpu_search
from eae_dist.latent.index import KINDS, LatentIndex

pytestmark = pytest.mark.gpu
HERE = gpu_search.gpu() is not None
DEVICES = ["stand-in", pytest.param("cuda", marks=pytest.mark.skipif(not HERE, reason="FAISS or torch sees no GPU"))]
ROWS, D = 10_000, 128  # the latents of CIFAR-10
SUPPORTED = {1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96}  # bytes a code


def cells_of(index: faiss.Index) -> faiss.IndexIVF | None:
    cells = faiss.try_extract_index_ivf(index)
    return None if cells is None else faiss.downcast_index(cells)


class Copy:
    """What FAISS copies to a GPU, with its limits."""

    def __init__(self, resources, device, index, options):
        cells = cells_of(index)
        if isinstance(cells, faiss.IndexIVFPQ):
            code = cells.pq
            if isinstance(cells, faiss.IndexIVFPQFastScan) or code.nbits != 8 or code.M not in SUPPORTED or cells.polysemous_ht:
                raise RuntimeError(f"codes of {code.M} times {code.nbits} bits are not supported")
            if (bytes_ := code.M * 256 * (2 if options.useFloat16 else 4)) > 49_152:
                raise RuntimeError(f"Device 0 has 49152 bytes of shared memory, while {code.M} sub-quantizers require {bytes_}")
        elif not isinstance(index, faiss.IndexFlat | faiss.IndexIVFFlat):
            raise RuntimeError("This index type is not implemented on GPU.")
        self.nprobe = 1 if cells is None else cells.nprobe
        self._check("nprobe", self.nprobe)
        self.index, self.resources, self.fails = index, resources, None

    def search(self, queries, k):
        if self.fails:
            raise RuntimeError(self.fails)
        self._check("k", k)
        self._check("nprobe", self.nprobe)
        cells = cells_of(self.index)
        if cells is None:
            return self.index.search(queries, k)
        on_cpu, cells.nprobe = cells.nprobe, self.nprobe
        try:
            return self.index.search(queries, k)
        finally:
            cells.nprobe = on_cpu

    def _check(self, what: str, value: int) -> None:
        if value > 2048:
            raise RuntimeError(f"GPU index only supports {what} up to 2048 (requested {value})")


class Parameters:
    def set_index_parameter(self, index, name, value):
        setattr(index, name, int(value))


class Options:
    """In the place of FAISS' own, which faiss-cpu lacks."""

    useFloat16 = False


class Memory:
    """Bytes of GPU memory that are free."""

    free = 8 * 2**30


@pytest.fixture
def stand_in(monkeypatch) -> Memory:
    memory = Memory()
    for module, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "empty_cache", lambda: None),
        (torch.cuda, "mem_get_info", lambda device: (memory.free, 80 * 2**30)),
        (faiss, "get_num_gpus", lambda: 2),
        (faiss, "StandardGpuResources", object),
        (faiss, "GpuClonerOptions", getattr(faiss, "GpuClonerOptions", Options)),
        (faiss, "index_cpu_to_gpu", Copy),
        (faiss, "GpuParameterSpace", Parameters),
    ):
        monkeypatch.setattr(module, name, value, raising=False)
    gpu_search.resources.cache_clear()
    yield memory
    gpu_search.resources.cache_clear()


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    """A GPU, or its stand-in."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
    return request.param


@pytest.fixture(scope="module")
def latents() -> tuple[np.ndarray, np.ndarray]:
    """10,000 rows of 128 dimensions in 40 clusters, as long as batch-normed ones, and 100 queries of the same."""
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(40, D))
    drawn = [centers[generator.integers(40, size=n)] + 0.3 * generator.normal(size=(n, D)) for n in (ROWS, 100)]
    return tuple(rows.astype(np.float32) for rows in drawn)


def found_share(rows: np.ndarray, queries: np.ndarray, squared: np.ndarray) -> float:
    """The share of the nearest rows that a search found, by their distances."""
    exact = torch.cdist(torch.from_numpy(queries).double(), torch.from_numpy(rows).double()).square()
    furthest = exact.topk(squared.shape[1], largest=False).values[:, -1:].numpy()
    return float((squared <= furthest * (1 + 1e-5)).mean())


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_index_of_cifar10s_latents_finds_on_a_gpu_what_it_finds_on_a_cpu(device, kind, latents, tmp_path):
    rows, queries = latents
    index = LatentIndex.build(rows, kind)
    assert [part.on_gpu is not None for part in index._parts] == [kind != "hnsw"]
    assert index.tune(queries[:50], 0.95) >= 0.95
    squared, ids = index.search(queries[50:], 10)
    assert index._parts[0].on_gpu is not None or kind == "hnsw"  # nothing failed there
    assert found_share(rows, queries[50:], squared) >= (1 if kind == "flat" else 0.9)
    np.testing.assert_allclose(squared, np.square(queries[50:, None].astype(float) - rows[ids]).sum(2), rtol=1e-5)
    index.save(tmp_path / "index")
    opened = LatentIndex.load(tmp_path / "index")
    assert [part.on_gpu is not None for part in opened._parts] == [kind != "hnsw"]
    assert np.array_equal(opened.search(queries[50:], 10)[1], ids)


@pytest.mark.parametrize("metric", ["cosine", "inner_product"])
@pytest.mark.parametrize("kind", ["flat", "ivf_flat"])
def test_index_of_another_metric_finds_on_a_gpu_what_it_finds_on_a_cpu(device, kind, metric, latents):
    rows, queries = latents
    index = LatentIndex.build(rows, kind, metric=metric)
    assert index.tune(queries[:50], 0.95) >= 0.95
    found = index.search(queries[50:], 10)
    assert index._parts[0].on_gpu is not None  # nothing failed there
    index._parts[0].on_gpu = None
    on_cpu = index.search(queries[50:], 10)
    same = min((mine == theirs).mean() for mine, theirs in zip(found, on_cpu, strict=True))
    assert same == 1 or (kind == "ivf_flat" and same > 0.99)  # rounding may choose another cell


@pytest.mark.parametrize(
    ("d", "longest", "factory"),
    [
        (7, 11, "Pad8,IVF9,PQ4x8np"),
        (16, 11, "IVF9,PQ8x8np"),
        (64, 11, "IVF9,PQ32x8np"),
        (100, 11, "Pad112,IVF9,PQ56x8np"),
        (128, 11, "IVF9,PQ64x8np"),
        (128, 1_000, "Pad144,IVF9,PQ48x8np"),  # squares beyond 65,504, the largest number of float16
        (128, 0.01, "Pad144,IVF9,PQ48x8np"),  # squares below 6e-8, its smallest
        (1_000, 11, "Pad1056,IVF9,PQ96x8np"),
    ],
)
def test_codes_are_a_byte_for_two_dimensions_as_far_as_a_gpu_supports_that(d, longest, factory):
    assert gpu_search.coded(d, 9, longest) == factory


@pytest.mark.parametrize("longest", [0.01, 11, 1_000])
def test_codes_of_any_latents_are_those_that_a_gpu_takes(longest, stand_in):
    for d in range(1, 400):
        index = faiss.index_factory(d, gpu_search.coded(d, 1, longest))
        cells, options = cells_of(index), faiss.GpuClonerOptions()
        options.useFloat16 = gpu_search.needs_float16(cells.pq.M)
        assert longest == 11 or not options.useFloat16
        assert cells.d >= d and cells.d % cells.pq.M == 0
        Copy(object(), 0, index, options)


@pytest.mark.parametrize("kind", ["flat", "ivf_flat", "ivf_pq"])
def test_latents_that_do_not_fit_are_searched_by_the_cpu_which_says_so(kind, stand_in, latents, caplog):
    rows, queries = latents
    wanted = LatentIndex.build(rows, kind).search(queries, 5)
    gpu_search.resources.cache_clear()  # a process that has searched nothing there yet
    stand_in.free = 2**31  # what FAISS takes for its own work
    index = LatentIndex.build(rows, kind)
    assert index._parts[0].on_gpu is None
    assert "the CPU searches the latents: they need 20" in caplog.text and "and 2048 MiB of GPU 0 are free" in caplog.text
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(index.search(queries, 5), wanted, strict=True))


def test_bytes_on_a_gpu_are_those_of_rows_norms_codes_ids_and_centers(latents):
    rows, _ = latents
    assert gpu_search.bytes_on_gpu(rows, None) == ROWS * (128 + 1) * 4
    cells = faiss.index_factory(D, "IVF10,PQ64x8np")
    cells.train(rows)
    cells.add(rows)
    assert gpu_search.bytes_on_gpu(rows, cells) == (ROWS + 10 * 32) * (64 + 8) + 10 * (128 + 1) * 4


def test_copy_that_fails_leaves_the_cpu_to_search(stand_in, latents, monkeypatch, caplog):
    def failing(*_):
        raise RuntimeError("StandardGpuResources: alloc fail")

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", failing)
    index = LatentIndex.build(latents[0])
    assert index._parts[0].on_gpu is None and (index.search(latents[0][:9], 1)[1][:, 0] == np.arange(9)).all()
    assert "the CPU searches the latents: FAISS could not copy them to GPU 0 (StandardGpuResources: alloc fail)" in caplog.text


def test_search_that_fails_on_a_gpu_is_done_by_the_cpu_from_there_on(stand_in, latents, caplog):
    index = LatentIndex.build(latents[0])
    index._parts[0].on_gpu.fails = "alloc fail"
    for _ in range(2):
        assert (index.search(latents[0][:9], 1)[1][:, 0] == np.arange(9)).all()
    assert [record.getMessage() for record in caplog.records] == [
        "from here on the CPU searches the latents: FAISS failed on the GPU (alloc fail)"
    ]


def test_more_neighbors_and_more_cells_than_a_gpu_takes_are_left_to_the_cpu(stand_in, latents, tmp_path, caplog):
    rows, queries = latents
    index = LatentIndex.build(rows, "ivf_flat")
    assert found_share(rows, queries, index.search(queries, 2_049)[0]) > 0.5  # with the candidates to spare above 2,048
    index._set_effort(4_000)  # an index of a million rows has so many cells
    assert found_share(rows, queries, index.search(queries, 5)[0]) == 1
    assert index._parts[0].on_gpu is not None and not caplog.records
    index.save(tmp_path / "index")
    opened = LatentIndex.load(tmp_path / "index")
    assert opened.effort == 4_000 and opened._parts[0].on_gpu is not None
    assert found_share(rows, queries, opened.search(queries, 5)[0]) == 1


def test_tuning_beyond_what_a_gpu_takes_is_said(stand_in, latents, monkeypatch, caplog):
    monkeypatch.setattr(gpu_search, "MOST", 20)  # the index has 256 cells
    with caplog.at_level(logging.INFO, "eae_dist"):
        index = LatentIndex.build(latents[0], "ivf_flat")
        noise = np.random.default_rng(1).normal(size=(200, D)).astype(np.float32)  # as near to one cluster as to another
        assert index.tune(noise, 1.0) == 1
    assert index.effort > 20 and f"nprobe={index.effort}, of which a GPU takes 20 at most" in caplog.text


def test_codes_that_were_made_without_a_gpu_are_searched_by_the_cpu_which_says_so(latents, tmp_path, request, caplog):
    rows, queries = latents
    index = LatentIndex.build(rows, "ivf_pq") if not HERE else None
    if index is None:
        pytest.skip("FAISS sees a GPU here: codes are made for it")
    index.save(tmp_path / "index")
    request.getfixturevalue("stand_in")
    with caplog.at_level(logging.INFO, "eae_dist"):
        opened = LatentIndex.load(tmp_path / "index")
    assert opened._parts[0].on_gpu is None and "their codes were made where there was no GPU" in caplog.text
    assert np.array_equal(opened.search(queries, 5)[1], index.search(queries, 5)[1])


def test_a_process_has_one_gpu_and_shares_its_memory_among_all_indexes(stand_in, latents):
    indexes = [LatentIndex.build(latents[0], kind) for kind in ("flat", "ivf_flat")]
    first, second = (index._parts[0].on_gpu.resources for index in indexes)
    assert first is second and gpu_search.gpu() == 0  # of two


def test_gpu_that_torch_does_not_see_is_left_alone(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_search.gpu() is None
