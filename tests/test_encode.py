"""Latents of a data set on disk, and what `neighbors` makes of them."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from accelerate import PartialState
from conftest import image_of, write_shards
from PIL import Image
from ranks import run_ranks
from run_folders import save_run
from world_cases import configured

import eae_dist
from eae_dist import encode as encode_module
from eae_dist import neighbors as neighbors_module
from eae_dist.data.stream import read_samples, walk
from eae_dist.distributed import rank
from eae_dist.encode import encode
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.latent.index import DamagedIndex, LatentIndex
from eae_dist.latent.store import DamagedLatents, LatentFolder
from eae_dist.model.autoencoder import to_unit
from eae_dist.neighbors import from_their_ranks, main, near_pairs

pytestmark = pytest.mark.usefixtures("cpu")
RANKS = (1, 2, 4)
COUNTS = {"test": 33, "train": 150, "validation": 40}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(encode_module, "PART_ROWS", 32)


@pytest.fixture
def latents(run, tmp_path) -> LatentFolder:
    return encode(run, tmp_path / "latents", [])


def bits(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != "manifest.json"}


def test_every_sample_of_every_split_is_encoded_once_in_order(run, latents, shards):
    model = eae_dist.load(run)
    assert {split: latents.rows(split) for split in latents.parts} == COUNTS
    assert len(latents.parts["train"]) == 5 and latents.d == 5
    for split in COUNTS:
        batches = list(walk(shards, split, 16))
        images = torch.cat([batch["image"] for batch in batches])
        with torch.no_grad():
            expected = model.encode(to_unit(images, torch.device("cpu")))
        np.testing.assert_allclose(latents.read(split, "latents"), expected.numpy(), atol=1e-5)
        assert latents.read(split, "keys").tolist() == [key.encode() for batch in batches for key in batch["key"]]
        assert latents.read(split, "labels").tolist() == torch.cat([batch["label"] for batch in batches]).tolist()
    assert np.array_equal(latents.read("train", "latents", 20, 120), latents.read("train", "latents")[20:120])
    assert latents.read("train", "latents", 7, 7).shape == (0, 5)
    numbers = np.array([149, 3, 40, 3])
    assert torch.equal(
        read_samples(shards, "train", numbers), torch.cat([b["image"] for b in walk(shards, "train", 16)])[numbers]
    )


SMALL = {"empty": "", "null": "null", "list": "[]", "cut": '{"version": 1, "about', "no keys": "{}", "number": "1"}


@pytest.mark.parametrize("text", SMALL.values(), ids=SMALL)
def test_manifest_that_cannot_be_read_is_named(latents, text):
    (latents.root / "manifest.json").write_text(text)
    with pytest.raises(DamagedLatents, match=f"{latents.root}/manifest.json cannot be read .*encode again into another folder"):
        LatentFolder.open(latents.root)


@pytest.mark.parametrize(("old", "new"), [('"rows": 32', '"rows": 23'), ('"batch": 16', '"batch": 17'), ('"d": 5', '"d": 4')])
def test_changed_digit_in_a_manifest_is_seen(latents, old, new):
    manifest = latents.root / "manifest.json"
    assert old in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    with pytest.raises(DamagedLatents, match="does not match its checksum"):
        LatentFolder.open(latents.root)


@pytest.mark.parametrize("text", SMALL.values(), ids=SMALL)
def test_part_whose_description_cannot_be_read_is_encoded_again(run, latents, tmp_path, monkeypatch, caplog, text):
    original, written = encode_module.write_part, []

    def stopped(root, name, *arrays):
        if len(written) == 3:
            raise OSError("no space")
        original(root, name, *arrays)
        written.append(name)

    monkeypatch.setattr(encode_module, "write_part", stopped)
    with pytest.raises(OSError, match="no space"):
        encode(run, tmp_path / "out", [])
    monkeypatch.undo()
    monkeypatch.setattr(encode_module, "PART_ROWS", 32)
    (broken := tmp_path / "out" / f".{written[1]}.json").write_text(text)
    assert bits(encode(run, tmp_path / "out", []).root) == bits(latents.root)
    assert f"{broken} cannot be read" in caplog.text


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_latents_and_neighborhoods_are_the_same_on_any_number_of_ranks(world, ranks):
    one, several = (world(w)["encoded_latents"] for w in (1, ranks))
    assert one == several


def test_encode_goes_on_with_what_is_missing(run, latents, tmp_path, monkeypatch):
    written, original = [], encode_module.write_part

    def failing(root, name, *arrays):
        if len(written) == 3:
            raise OSError("No space left on device")
        written.append(name)
        original(root, name, *arrays)

    monkeypatch.setattr(encode_module, "write_part", failing)
    with pytest.raises(OSError, match="No space left"):
        encode(run, tmp_path / "again", [])
    with pytest.raises(FileNotFoundError, match="encoding is unfinished; run the same command to continue"):
        LatentFolder.open(tmp_path / "again")
    # One of the finished parts is damaged meanwhile.
    (tmp_path / "again" / f"{written[0]}.labels.npy").write_bytes(b"")
    first, done = written[0], set(written[1:])
    written[:] = [""] * 4
    encode(run, tmp_path / "again", [])
    assert first in written and not done & set(written)
    assert bits(tmp_path / "again") == bits(latents.root)
    monkeypatch.setattr(encode_module, "write_part", lambda *_: pytest.fail("a finished folder was encoded again"))
    assert encode(run, tmp_path / "again", []).about == latents.about


def kill_at_second_part(directory: str, out: str) -> None:
    """Encodes; the last rank is killed as it writes its second part."""
    original, written = encode_module.write_part, []

    def killed(root, name, *arrays):
        if written and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(name)
        original(root, name, *arrays)

    encode_module.PART_ROWS = 32
    if not os.path.exists(f"{out}/.encoding.json"):
        encode_module.write_part = killed
    encode_module.main(["--ckpt", directory, "--out", out])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_killed_encode_goes_on_to_the_same_files(ranks, run, latents, tmp_path):
    command = (str(run), str(tmp_path / "killed"))
    *_, code = run_ranks(ranks, tmp_path / "logs", kill_at_second_part, *command).codes
    assert code == -signal.SIGKILL and not (tmp_path / "killed" / "manifest.json").exists()
    ended = run_ranks(ranks, tmp_path / "logs", kill_at_second_part, *command)
    assert ended.codes == [0] * ranks, ended.said
    assert bits(tmp_path / "killed") == bits(latents.root)


def test_damaged_part_is_named(latents):
    path = latents.root / "train-000001.latents.npy"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert latents.read("train", "latents", 0, 30).shape == (30, 5)  # of another part
    with pytest.raises(DamagedLatents, match="train-000001.latents.npy does not match its checksum"):
        latents.read("train", "latents")
    path.unlink()
    with pytest.raises(DamagedLatents, match="train-000001.latents.npy is missing"):
        latents.read("train", "latents")


def test_what_does_not_belong_together_is_refused(run, latents, shards, tmp_path):
    other = save_run(tmp_path / "other", configured(shards, "eae", "train.seed=9"))
    with pytest.raises(ValueError, match="manifest.json describes other latents; .*\n  model_sha256: "):
        encode(other, latents.root, [])
    with pytest.raises(ValueError, match="holds the latents of other weights than"):
        EncodedDataset(latents.root, other, [])
    moved = write_shards(tmp_path / "moved", {"train": (9,), "test": (9,)})
    with pytest.raises(ValueError, match=r"data.root=.*moved is not the data set of .*latents;"):
        EncodedDataset(latents.root, None, [f"data.root={moved}"])
    color = write_shards(tmp_path / "color", {"train": (9,)}, shape=(3, 16, 16))
    with pytest.raises(ValueError, match=r"holds images of shape \(3, 16, 16\)"):
        encode(run, tmp_path / "colors", [f"data.root={color}"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="full is not empty and holds no latents"):
        encode(run, tmp_path / "full", [])
    with pytest.raises(ValueError, match="no latents of a split 'tset'; it has test, train, validation"):
        latents.rows("tset")
    run.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="give --ckpt if it moved"):
        EncodedDataset(latents.root, None, [])
    assert EncodedDataset(latents.root, tmp_path / "elsewhere", []).folder.d == 5


def test_neighbors_of_a_data_set_with_copies(tmp_path, capsys):
    root = write_shards(tmp_path / "shards", {"train": (60, 60), "test": (20,)})
    run = save_run(tmp_path / "run", configured(root, "eae"))
    encode(run, tmp_path / "latents", [f"data.root={root}"])
    out = tmp_path / "latents" / "neighbors"
    main(["--latents", str(tmp_path / "latents"), "index.k=3", "index.samples=15"])
    said, found = capsys.readouterr().out, json.loads((out / "neighbors.json").read_text())
    assert "120 train latents, index flat: 120 rows" in said and f"neighbors.json in {out}" in said
    assert {path.name for path in out.iterdir()} >= {"queries.png", "samples.png", "distances.png", "duplicates.csv"}
    assert found["memorization"]["samples"] == 15 and found["memorization"]["queries"] == 20
    assert found["duplicates"]["exact"] == 0 and 0 <= found["label_accuracy"] <= 1
    # Every training image is a query: it is its own neighbor, and its label is told.
    main(
        ["--latents", str(tmp_path / "latents"), "index.k=1", "index.query_split=train", "--json", "--out", str(tmp_path / "own")]
    )
    own = json.loads(capsys.readouterr().out)
    assert own["memorization"]["median_query"] == 0 and own["label_accuracy"] == 1
    assert own["memorization"]["sample_nearer"] == 0


def test_pairs_of_copies_are_listed_once_nearest_first():
    apart = np.array([0.0, 0.3, 0.0, 0.1, 5.0, 0.1])
    twin = np.array([2, 3, 0, 5, 1, 3])
    distances, pairs = near_pairs(apart, twin, 0.2)
    assert distances.tolist() == [0.0, 0.1] and pairs.tolist() == [[0, 2], [3, 5]]
    assert near_pairs(apart, twin, 0.0)[1].tolist() == [[0, 2]]  # equal ones always


def test_images_are_queries(latents, shards, tmp_path, capsys):
    Image.fromarray(image_of(7).squeeze(2)).save(tmp_path / "seven.png")  # training image 7
    assert torch.equal(read_samples(shards, "train", np.array([7]))[0, 0], torch.from_numpy(image_of(7).squeeze(2)))
    main(["--latents", str(latents.root), "--query", str(tmp_path / "seven.png"), "index.k=2"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}/seven.png:" and len(lines) == 4
    assert lines[1].split()[:2] == ["0.0000", "000007"]
    main(["--latents", str(latents.root), "--query", str(tmp_path / "seven.png"), "--json", "index.k=2"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["neighbors"][0]["row"] == 7 and (latents.root / "neighbors" / "query.png").is_file()


@pytest.mark.parametrize(
    ("size", "words"), [((8, 16), "is 8x16, the model takes 16x16"), (None, "is not a usable image: not an image")]
)
def test_wrong_query_is_one_line(latents, tmp_path, size, words):
    path = tmp_path / "odd.png"
    Image.new("L", size).save(path) if size else path.write_text("no picture")
    with pytest.raises(SystemExit, match=words):
        main(["--latents", str(latents.root), "--query", str(path)])


@pytest.mark.parametrize(("metric", "score"), [("cosine", "cosine"), ("inner_product", "inner_product")])
def test_images_are_queries_by_another_metric(latents, tmp_path, capsys, metric, score):
    Image.fromarray(image_of(7).squeeze(2)).save(tmp_path / "seven.png")  # training image 7
    merged = ["--merge", str(tmp_path / "train.faiss")]
    main(["--latents", str(latents.root), "--query", str(tmp_path / "seven.png"), "--json", f"index.metric={metric}", *merged])
    (found,) = json.loads(capsys.readouterr().out)
    values = [near[score] for near in found["neighbors"]]
    rows = latents.read("train", "latents").astype(np.float64)
    products = rows @ rows[7] / (np.linalg.norm(rows, axis=1) * np.linalg.norm(rows[7]) if metric == "cosine" else 1)
    np.testing.assert_allclose(values, np.sort(products)[::-1][:5], rtol=1e-4)  # the query is encoded in another batch
    assert (tmp_path / "train.faiss").is_file()


def test_inner_products_cannot_tell_copies_and_cosines_have_no_entropy(latents, capsys):
    with pytest.raises(SystemExit, match="index.metric=inner_product has no distances to compare; take index.metric=l2"):
        main(["--latents", str(latents.root), "index.metric=inner_product"])
    main(["--latents", str(latents.root), "index.metric=cosine", "--json"])
    assert json.loads(capsys.readouterr().out)["entropy"] is None
    with pytest.raises(SystemExit, match="--vector-column and --id-column are for parquet files"):
        main(["--latents", str(latents.root), "--id-column", "id"])


def test_index_is_kept_and_made_anew_for_other_settings(latents, monkeypatch):
    space = EncodedDataset(latents.root, None, [])
    assert space.index().kind == "flat"
    build = LatentIndex.build
    monkeypatch.setattr(LatentIndex, "build", lambda *_, **__: pytest.fail("the index was made again"))
    assert EncodedDataset(latents.root, None, ["index.k=9"]).index().n == 150
    monkeypatch.setattr(LatentIndex, "build", build)
    other = EncodedDataset(latents.root, None, ["index.kind=ivf_flat", "index.recall=0.9"]).index()
    assert other.kind == "ivf_flat" and other.about["recall"] == 0.9


@pytest.mark.parametrize(("name", "text"), [("index.json", "{"), ("index.json", "[]"), ("part-000000000000.npy", "x")])
def test_damage_of_the_kept_index_is_said_with_the_way_out(latents, name, text):
    index = latents.root / "index-train"
    EncodedDataset(latents.root, None, []).index()
    (index / name).write_text(text)
    with pytest.raises(DamagedIndex, match=f"{name} .*; remove {index} to make it again"):
        EncodedDataset(latents.root, None, []).index()
    shutil.rmtree(index)
    assert EncodedDataset(latents.root, None, []).index().n == 150


def images_from_their_ranks() -> None:
    """Each rank has two images more than the one before; image i has the value i everywhere."""
    PartialState(cpu=True)
    start = rank() * (rank() + 1)
    numbers = torch.arange(start, start + 2 * (rank() + 1), dtype=torch.uint8)
    found = from_their_ranks(numbers[:, None, None, None].expand(-1, 3, 4, 4).contiguous(), np.array([11, 0, 5, 6, 2]))
    assert found.shape == (5, 3, 4, 4) and found.dtype == np.uint8
    assert (found == np.array([11, 0, 5, 6, 2])[:, None, None, None]).all()


def test_images_of_any_rank_come_in_the_order_of_their_numbers(tmp_path):
    ended = run_ranks(3, tmp_path / "logs", images_from_their_ranks)
    assert ended.codes == [0, 0, 0], ended.said


def numbers_of_neighbors(latents: str, out: str) -> None:
    neighbors_module.main(["--latents", latents, "--out", out, "evaluate.batch=64"])


def test_neighbors_need_no_samples_on_every_rank(latents, tmp_path):
    """33 samples are one block of evaluate.batch, which one rank draws."""
    found = []
    for ranks in (1, 2):
        ended = run_ranks(ranks, tmp_path / "logs", numbers_of_neighbors, str(latents.root), str(tmp_path / str(ranks)))
        assert ended.codes == [0] * ranks, ended.said
        found.append((tmp_path / str(ranks) / "neighbors.json").read_text())
    assert found[0] == found[1]


def killed_search(latents: str) -> None:
    from eae_dist.latent import index

    original = index.nearest

    def killed(*arguments):
        if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    index.nearest = killed
    neighbors_module.main(["--latents", latents])


def test_rank_that_is_killed_during_a_search_ends_the_others(latents, tmp_path):
    ended = run_ranks(3, tmp_path / "logs", killed_search, str(latents.root))
    assert ended.codes[-1] == -signal.SIGKILL and all(code > 0 for code in ended.codes[:-1]), ended
    for said in ended.said[:-1]:
        assert "rank 2 ended or hangs" in said and "start the same command again" in said and "Traceback" not in said, said
