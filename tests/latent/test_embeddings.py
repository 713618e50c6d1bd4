"""Embeddings of other models: files of vectors, what is refused of them, and what `neighbors` makes of them."""

import csv
import json
import os

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from world_search import ROWS, latents, queries

from eae_dist.latent.embeddings import Embeddings
from eae_dist.latent.index import LatentIndex
from eae_dist.latent.merged_index import merge
from eae_dist.latent.vector_files import VectorFiles
from eae_dist.neighbors import main

pytestmark = pytest.mark.usefixtures("cpu")
FLOAT16 = np.arange(12, dtype=np.float16).reshape(4, 3)


def written(path, **columns):
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


@pytest.fixture
def embeddings(tmp_path):
    np.save(tmp_path / "embeddings.npy", latents())
    np.save(tmp_path / "asked.npy", queries().astype(np.float64))
    return tmp_path / "embeddings.npy"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy_file_of_any_float_is_read(tmp_path, dtype, order):
    np.save(tmp_path / "x.npy", np.asarray(FLOAT16, dtype=dtype, order=order))
    files = VectorFiles.open([tmp_path / "x.npy"])
    assert (files.n, files.d) == (4, 3)
    rows = files.read(1, 3, "l2")
    assert rows.dtype == np.float32 and np.array_equal(rows, FLOAT16[1:3]) and files.keys(np.array([3, 0])) == ["3", "0"]


def test_npy_file_of_float32_stays_on_the_disk(embeddings):
    rows = VectorFiles.open([embeddings]).read(5, 50, "l2")
    assert isinstance(rows, np.memmap) and np.shares_memory(rows, rows.base)


@pytest.mark.parametrize("kind", [pa.list_(pa.float32()), pa.large_list(pa.float64()), pa.list_(pa.float16(), 3)])
def test_parquet_files_with_ids_are_read_across_row_groups_and_files(tmp_path, kind):
    rows = np.arange(30, dtype=np.float16).reshape(10, 3)
    for name, part in (("b", rows[7:]), ("a", rows[:7])):
        column = pa.array(list(part), type=kind)
        written(tmp_path / f"{name}.parquet", vector=column, number=[1] * len(part), id=[f"row {row[0]:.0f}" for row in part])
    nothing = {"vector": pa.array([], kind), "number": pa.array([], pa.int64()), "id": pa.array([], pa.string())}
    written(tmp_path / "empty.parquet", **nothing)
    files = VectorFiles.open([tmp_path], id_column="id")
    assert (files.n, files.d) == (10, 3)
    for start, stop in ((0, 10), (2, 4), (6, 8), (7, 10), (3, 3)):
        assert np.array_equal(files.read(start, stop, "l2"), rows[start:stop])
    assert files.keys(np.array([9, 0, 7])) == ["row 27", "row 0", "row 21"]
    assert VectorFiles.open([tmp_path]).keys(np.array([9])) == ["9"]


def test_tensors_of_a_fixed_shape_in_parquet_are_vectors(tmp_path):
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(FLOAT16.astype(np.float32))
    files = VectorFiles.open([written(tmp_path / "x.parquet", vector=tensors)])
    assert np.array_equal(files.read(1, 4, "l2"), FLOAT16[1:])


def with_row(row: int, value: float) -> np.ndarray:
    rows = np.ones((6, 3))
    rows[row] = value
    return rows


NPY = {
    "1-d": (np.ones(3), r"x.npy holds float64 \(3,\); expected \[rows, dimensions\] of float16, float32, float64"),
    "no dimension": (np.ones((3, 0)), r"x.npy holds float64 \(3, 0\); expected"),
    "whole numbers": (np.ones((3, 2), int), r"x.npy holds int64 \(3, 2\); expected"),
    "pickled": (np.array([{}]), r"x.npy is not a usable .npy file \(.*objects.*\); save it with numpy.save as float32"),
    "nan": (with_row(4, np.nan), "x.npy has rows that are not finite or have a norm of 4.6e.18 or more: row 4; remove them"),
    "too large": (with_row(2, 1e300), "x.npy has rows that are not finite or .*: row 2;"),
    "no rows": (np.ones((0, 3)), "x.npy: the files hold no rows"),
}


@pytest.mark.parametrize("case", NPY)
def test_wrong_npy_file_is_refused_by_name(tmp_path, case):
    rows, words = NPY[case]
    np.save(tmp_path / "x.npy", rows)
    with pytest.raises(ValueError, match=words):
        VectorFiles.open([tmp_path / "x.npy"]).read(0, 6, "l2")


def test_zero_row_has_no_cosine(tmp_path):
    np.save(tmp_path / "x.npy", with_row(5, 0))
    files = VectorFiles.open([tmp_path / "x.npy"])
    assert files.read(3, 6, "inner_product").shape == (3, 3)
    with pytest.raises(ValueError, match="x.npy has rows that are zero and have no direction, .*metric=cosine compares: row 5;"):
        files.read(3, 6, "cosine")


PARQUET = {
    "ragged": ({"v": [[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [1.0]]}, "row 3 of the column v has 1 numbers; expected 2 as in row 0"),
    "missing": ({"v": [[1.0, 2.0], None]}, "row 1 of the column v has 0 numbers; expected 2"),
    "missing number": ({"v": [[1.0, 2.0], [1.0, None]]}, "x.parquet has rows that are not finite or .*: row 1;"),
    "empty": ({"v": [[], [1.0]], "w": [1, 2]}, "row 0 of the column v has no numbers"),
    "several": ({"v": [[1.0]], "w": [[1.0]]}, r"has the columns v \(list.*\), w \(.*\); several hold lists of .*--vector-column"),
    "none": ({"v": [1.0], "w": [[1]]}, r"has the columns v \(double\), w \(.*int64.*\); none holds lists of float16"),
}


@pytest.mark.parametrize("case", PARQUET)
def test_wrong_parquet_file_is_refused_by_name(tmp_path, case):
    columns, words = PARQUET[case]
    path = written(tmp_path / "x.parquet", **{name: pa.array(column) for name, column in columns.items()})
    with pytest.raises(ValueError, match=words):
        (files := VectorFiles.open([path])).read(0, files.n, "l2")


@pytest.mark.parametrize("column", ["v", "id"])
def test_damaged_page_of_a_parquet_file_is_told_by_its_name(tmp_path, column):
    path = written(tmp_path / "x.parquet", v=list(latents()[:20]), id=[f"row {row}" for row in range(20)])
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(("v", "id").index(column))
    damaged = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    damaged[start : start + 12] = b"\xa5" * 12
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match="x.parquet is damaged or not a parquet file"):
        (files := VectorFiles.open([path], "v", "id")).read(0, files.n, "l2")
        files.keys(np.arange(20))


def test_wrong_names_of_columns_are_refused(tmp_path):
    path = written(tmp_path / "x.parquet", v=[[1.0]], w=[[2.0]], id=[7])
    for columns, words in {
        ("u", None): "--vector-column u: .*x.parquet has the columns",
        ("id", None): "--vector-column id: .*; expected lists of float16",
        ("v", "u"): "--id-column u: .*x.parquet has the columns",
    }.items():
        with pytest.raises(ValueError, match=words):
            VectorFiles.open([path], *columns)
    assert VectorFiles.open([path], "w", "id").read(0, 1, "l2").tolist() == [[2.0]]


def test_folders_and_files_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    (tmp_path / "widths").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", np.ones((2, 3)))
    written(tmp_path / "mixed" / "b.parquet", v=[[1.0]])
    for d in (3, 4):
        np.save(tmp_path / "widths" / f"{d}.npy", np.ones((2, d)))
    (tmp_path / "text.txt").write_text("1 2 3")
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "text.parquet").write_text("1 2 3")
    for name, words in {
        "empty": "empty holds no .npy or .parquet file, and no latents of `python -m eae_dist.encode`",
        "mixed": "mixed holds .npy and .parquet files; expected one kind",
        "widths": "4.npy has 4 dimensions; expected 3 as in .*3.npy",
        "text.txt": "text.txt is another file; expected",
        "text.npy": "text.npy is not a usable .npy file",
        "text.parquet": "text.parquet is damaged or not a parquet file",
    }.items():
        with pytest.raises(ValueError, match=words):
            VectorFiles.open([tmp_path / name])
    with pytest.raises(FileNotFoundError, match="nowhere.npy does not exist"):
        VectorFiles.open([tmp_path / "nowhere.npy"])


def test_index_of_embeddings_is_kept_until_the_file_changes(embeddings, tmp_path, monkeypatch):
    def index(*settings):
        return Embeddings(embeddings, tmp_path / "index", settings).index()

    assert index("index.kind=ivf_flat").kind == "ivf_flat"
    build = LatentIndex.build
    monkeypatch.setattr(LatentIndex, "build", lambda *_, **__: pytest.fail("the index was made again"))
    assert index("index.kind=ivf_flat", "index.k=9").n == ROWS
    monkeypatch.setattr(LatentIndex, "build", build)
    assert index("index.kind=ivf_flat", "index.metric=cosine").metric == "cosine"
    np.save(embeddings, latents()[:500])
    os.utime(embeddings, ns=(1, 1))
    assert index("index.kind=ivf_flat", "index.metric=cosine").n == 500


def test_recall_of_embeddings_is_that_of_ten_other_rows(tmp_path, caplog):
    rows = np.random.default_rng(0).normal(size=(4_000, 8)).astype(np.float32)
    np.save(tmp_path / "x.npy", rows)
    with caplog.at_level("INFO", logger="eae_dist"):
        index = Embeddings(tmp_path / "x.npy", tmp_path / "index", ["index.kind=ivf_flat", "index.recall=0.8"]).index()
    exact = LatentIndex.build(rows, "flat").search(rows[::4], 11)[1][:, 1:]
    share = (index.search(rows[::4], 11)[1][:, 1:, None] == exact[:, None]).any(1).mean()
    assert share >= 0.8 and f"the index finds {100 * share:.1f} % of the ten nearest rows" in caplog.text


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_near_duplicates_of_embeddings_are_listed(embeddings, tmp_path, capsys, metric):
    settings = [f"index.metric={metric}", "index.duplicate_ratio=0.01"]
    main(["--latents", str(embeddings), "--merge", str(tmp_path / "m.faiss"), *settings])
    said, out = capsys.readouterr().out, tmp_path / "embeddings-neighbors"
    found = json.loads((out / "neighbors.json").read_text())
    pairs = list(csv.reader((out / "duplicates.csv").read_text().splitlines()))
    assert pairs[0] == ["distance", "key", "other key"]
    copies = {3, *range(100, 110), 370, 371, *range(500, 507)}
    near = {frozenset(map(int, pair[1:])) for pair in pairs[1:]}
    assert {frozenset((row, row + 680)) for row in range(20, 40)} <= near
    assert copies <= set().union(*near) and found["duplicates"]["exact"] == len(copies)
    assert "900 embeddings of 6 dimensions, index flat" in said and f"rows with a twin: {len(copies)} exact" in said
    assert "need a model and its images, and are left out" in said and f"one FAISS file in {tmp_path}/m.faiss" in said
    assert faiss.read_index(str(tmp_path / "m.faiss")).ntotal == ROWS and "query_split" not in found["settings"]


def test_inner_products_have_no_duplicates_and_it_is_said(embeddings, tmp_path, capsys):
    main(["--latents", str(embeddings), "index.metric=inner_product", "--out", str(tmp_path / "out")])
    assert "near-duplicates are left out; take index.metric=l2 or cosine" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "neighbors.json").read_text())["duplicates"] is None
    assert not (tmp_path / "out" / "duplicates.csv").exists()


@pytest.mark.parametrize(("metric", "score"), [("l2", "distance"), ("cosine", "cosine"), ("inner_product", "inner_product")])
def test_rows_of_another_file_are_queries(embeddings, tmp_path, capsys, metric, score):
    command = ["--latents", str(embeddings), "--query", str(tmp_path / "asked.npy"), "index.k=3", f"index.metric={metric}"]
    main([*command, "--json"])
    found = json.loads(capsys.readouterr().out)
    rows, asked = latents().astype(np.float64), queries().astype(np.float64)
    ids = LatentIndex.build(latents(), metric=metric).search(queries(), 3)[1]
    expected = {
        "l2": np.linalg.norm(asked[:, None] - rows[ids], axis=2),
        "inner_product": (asked[:, None] * rows[ids]).sum(2),
    }
    lengths = np.linalg.norm(asked, axis=1)[:, None] * np.linalg.norm(rows[ids], axis=2)
    expected["cosine"] = expected["inner_product"] / lengths
    assert [one["query"] for one in found] == [str(number) for number in range(50)]
    assert [[near["row"] for near in one["neighbors"]] for one in found] == ids.tolist()
    np.testing.assert_allclose([[n[score] for n in one["neighbors"]] for one in found], expected[metric], rtol=1e-5, atol=1e-6)
    table = list(csv.reader((tmp_path / "embeddings-neighbors" / "query.csv").read_text().splitlines()))
    assert table[0] == ["query", "key", "row", score] and len(table) == 151
    assert [row[:3] for row in table[1:4]] == [["0", str(row), str(row)] for row in ids[0]]
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "0:" and len(lines) == 41 and lines[-1].endswith("query.csv")


def test_ids_of_parquet_files_are_the_keys(tmp_path, capsys):
    path = written(tmp_path / "x.parquet", vector=list(latents()[:20]), name=[f"image {row}" for row in range(20)])
    np.save(tmp_path / "asked.npy", latents()[3:4])
    main(["--latents", str(path), "--id-column", "name", "--query", str(tmp_path / "asked.npy"), "--json", "index.k=1"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found == {"query": "0", "neighbors": [{"key": "image 3", "row": 3, "distance": 0.0}]}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["index.samples=5"], "index.samples needs a model and its images; for embeddings index.kind, .* remove index.samples=5"),
        (["data.root=x"], "data.root needs a model"),
        (["--ckpt", "run"], "--ckpt is the model of latents that `encode` wrote, and .*embeddings.npy are not such latents"),
        (["--id-column", "id"], "embeddings.npy: .npy files have no columns; leave out --vector-column and --id-column"),
        (["--query", "{folder}/narrow.npy"], "narrow.npy has 5 dimensions; expected 6 as in .*embeddings.npy"),
        (["--query", "{folder}/image.png"], "image.png is another file; expected a .npy or .parquet file"),
        (["index.metric=l3"], "index.metric='?l3'? .*l2"),
        (["--merge", "{folder}/embeddings.npy"], "--merge .*embeddings.npy needs a name that ends with .faiss"),
        (["--latents", "{folder}/nowhere.npy"], "--latents .*nowhere.npy does not exist; give embeddings, or a folder that"),
        (["--latents", "{folder}/one.npy"], "one.npy holds 1 row; near-duplicates need 2 at least, so give --query"),
    ],
)
def test_what_embeddings_do_not_have_is_refused_in_one_line(embeddings, tmp_path, more, words):
    np.save(tmp_path / "narrow.npy", queries()[:, :5])
    np.save(tmp_path / "one.npy", queries()[:1])
    (tmp_path / "image.png").write_text("")
    with pytest.raises(SystemExit, match=words):
        main(["--latents", str(embeddings), *(word.format(folder=tmp_path) for word in more)])


def test_kinds_that_cannot_be_merged_are_refused_with_the_ones_that_can(tmp_path):
    rows = np.random.default_rng(0).normal(size=(10_000, 4)).astype(np.float32)
    LatentIndex.build(rows, "ivf_pq").save(tmp_path / "codes")
    with pytest.raises(ValueError, match="index.kind=ivf_pq cannot be merged, .*; take index.kind=ivf_flat"):
        merge(tmp_path / "codes", tmp_path / "x.faiss")
    graph = LatentIndex.build(rows[:500], "hnsw")
    graph.save(tmp_path / "graph")
    merge(tmp_path / "graph", tmp_path / "x.faiss")
    assert np.array_equal(faiss.read_index(str(tmp_path / "x.faiss")).search(rows[:50], 3)[1], graph.search(rows[:50], 3)[1])
    graph._parts *= 2
    graph.save(tmp_path / "graphs")
    with pytest.raises(ValueError, match="hnsw cannot be merged, because each of its 2 parts .* or remove .*graphs and make"):
        merge(tmp_path / "graphs", tmp_path / "y.faiss")
    with pytest.raises(OSError, match="could not be written"):
        merge(tmp_path / "graph", tmp_path / "x.faiss" / "y.faiss")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codes", "graph", "graphs", "x.faiss"]
