"""Shards on a server: real ones on this machine, that stop, fail, stall and lie; the batches are those of the local folder."""

import fcntl
import io
import json
import logging
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest
from conftest import ROOT, TRAIN_SIZES, rank_environment, write_shards
from fsspec.implementations.memory import MemoryFileSystem

from eae_dist.config import load_config
from eae_dist.data import remote, servers
from eae_dist.data.order import SampleOrder
from eae_dist.data.remote import Cache, FetchError, RemoteFolder
from eae_dist.data.servers import checked_address
from eae_dist.data.shard_index import ShardIndex
from eae_dist.data.stream import ShardStream, walk
from eae_dist.pack import main
from eae_dist.training.setup import open_stream

EVEN = (10,) * 12  # shards of one size: all lanes change shard at once
MANY = 10**9  # bytes: all there is


class Server(ThreadingHTTPServer):
    """Serves a folder, and does what `faults` says: name -> the faults of the next requests for it, one each."""

    daemon_threads = True

    def __init__(self, root: Path):
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.release = threading.Event()  # ends stalls
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(root)))
        self.address = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.asked.append(name)
        fault = self.server.faults[name].pop(0) if self.server.faults.get(name) else None
        if fault is None:
            return super().do_GET()
        if fault.isdecimal():
            return self.send_error(int(fault))
        data = bytearray((Path(self.directory) / name).read_bytes())
        half = len(data) // 2
        if fault == "wrong byte":
            data[half] ^= 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(data) - (1 if fault == "short" else 0)))
        self.end_headers()
        self.wfile.write({"stops": data[:half], "stalls": data[:half], "short": data[:-1]}.get(fault, data))
        self.wfile.flush()
        if fault == "stalls":
            self.server.release.wait(20)
        self.close_connection = True


@pytest.fixture
def serve() -> Iterator:
    servers = []

    def start(root: Path) -> Server:
        servers.append(server := Server(root))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return server

    yield start
    for server in servers:
        server.release.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(serve, shards) -> Server:
    return serve(shards)


@pytest.fixture(scope="module")
def even(tmp_path_factory) -> Path:
    return write_shards(tmp_path_factory.mktemp("even") / "shards", {"train": EVEN, "validation": (7, 7, 7)})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> None:
    """`pack` has its cache in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture
def cache(tmp_path) -> Cache:
    return Cache(tmp_path / "cache", MANY, timeout=10, retries=2, first_wait=0)


def smaller(cache: Cache, **changed) -> Cache:
    return Cache(**(vars(cache) | changed))


def take(stream: ShardStream, steps: int) -> list[dict]:
    batches = iter(stream)
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def assert_same(found: list[dict], expected: list[dict]) -> None:
    assert [batch["key"] for batch in found] == [batch["key"] for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert all(a[name].equal(b[name]) for name in ("image", "label", "first"))


def kept_bytes(cache: Cache) -> int:
    """What the cache holds at one moment: nobody makes room for a file or names one meanwhile."""
    with open(cache.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(size_of(path) for path in cache.folder.iterdir() if remote.KEPT.fullmatch(path.name))


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # of a fetch that was given up
        return 0


# The same batches


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine may have cores
def test_batches_of_an_address_are_those_of_the_folder(server, shards, cache, workers):
    found = take(ShardStream(server.address, "train", 26, seed=3, cache=cache, workers=workers), 8)
    assert_same(found, take(ShardStream(shards, "train", 26, seed=3), 8))
    assert ShardIndex.load(server.address, cache).sha256 == ShardIndex.load(shards).sha256
    assert max(Counter(server.asked[1:]).values()) <= 2  # index.json; each other file once


def test_walk_of_an_address_is_that_of_the_folder(server, shards, cache):
    found = [batch["key"] for batch in walk(server.address, "test", 8, rank=0, world=1, cache=cache)]
    assert found == [batch["key"] for batch in walk(shards, "test", 8, rank=0, world=1)]


@pytest.mark.parametrize("sizes, lanes", [(TRAIN_SIZES, 26), (TRAIN_SIZES, 2), (EVEN, 4), ((1, 0, 2, 9), 3)])
def test_next_shards_are_those_that_the_lanes_enter(sizes, lanes):
    order = SampleOrder(np.array(sizes), seed=5, global_batch=lanes, lanes=lanes)
    shards, _ = order.rows(np.arange(400), 0, lanes)
    for lane in range(lanes):
        changes = np.flatnonzero(np.diff(shards[:, lane]))
        for step in range(0, changes[-1] + 1 if len(changes) else 0, 7):
            change = changes[np.searchsorted(changes, step)]
            found = order.next_shards(step, np.array([lane])).tolist()
            # Where a pass ends a lane can enter the shard it was in, which no change shows.
            assert found == [shards[change + 1, lane]] or found == [shards[step, lane]]


# What a server can do


@pytest.mark.parametrize("fault", ["stops", "500", "503", "429", "stalls", "wrong byte", "short"])
def test_fault_that_passes_changes_nothing(server, shards, cache, fault, caplog):
    server.faults = {"train-000004.tar": [fault, fault], "train-000000.members.npy": [fault], "index.json": ["500"]}
    cache = smaller(cache, timeout=0.3 if fault == "stalls" else 10)
    if fault in ("wrong byte", "short"):
        server.faults["train-000000.members.npy"] = ["wrong byte"]  # its size is in no table
    found = take(ShardStream(server.address, "train", 26, cache=cache), 8)
    assert_same(found, take(ShardStream(shards, "train", 26), 8))
    assert not any(server.faults.values()) and "trying again (2 of 2)" in caplog.text


WORDS = {
    "stops": "it broke off",
    "500": "it was answered with 500",
    "stalls": r"it sent nothing for data.timeout=0.3 seconds",
    "wrong byte": "it sent other bytes than were indexed: sha256",
    "short": "it ended after [0-9,]+ of [0-9,]+ bytes",
}


@pytest.mark.parametrize(("fault", "workers"), [*((fault, 0) for fault in WORDS), ("500", 1)])
def test_fault_that_stays_is_an_error_that_names_the_shard(server, cache, fault, workers):
    server.faults = {"train-000004.tar": [fault] * 100}
    cache = smaller(cache, timeout=0.3 if fault == "stalls" else 10, retries=1)
    with pytest.raises(FetchError, match=rf"^{server.address}/train-000004.tar could not be fetched in 2 tries: {WORDS[fault]}"):
        take(ShardStream(server.address, "train", 26, cache=cache, workers=workers), 8)


def test_each_try_waits_longer_than_the_one_before_up_to_half_a_minute(server, cache):
    waits = []

    class Noted(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)

    server.faults = {"train-000004.tar": ["500"] * 100}
    with pytest.raises(FetchError, match="in 8 tries"):
        RemoteFolder(server.address, smaller(cache, retries=7, first_wait=1.0)).copy("train-000004.tar", None, stop=Noted())
    assert waits == [1, 2, 4, 8, 16, 30, 30]


def test_fetch_that_is_stopped_in_its_last_try_says_that_the_stream_is_closed(server, cache):
    stop = threading.Event()

    class Stopping(io.BytesIO):
        def write(self, block):
            stop.set()
            return super().write(block)

    with pytest.raises(FetchError, match="the stream is closed"):
        RemoteFolder(server.address, smaller(cache, retries=0)).copy("train-000004.tar", Stopping(), stop=stop)


def test_shard_that_fails_in_the_middle_of_a_pass_ends_the_stream_there(serve, even, cache):
    server = serve(even)
    stream = ShardStream(server.address, "train", 4, lanes=2, cache=cache)
    expected = take(ShardStream(even, "train", 4, lanes=2), 30)
    shards, _ = stream.order.rows(np.arange(30), 0, 2)
    lost = next(shard for shard in shards[20] if shard not in shards[:10])
    server.faults = {f"train-{lost:06d}.tar": ["500"] * 100}
    found = []
    with pytest.raises(FetchError, match=f"train-{lost:06d}.tar"):
        for batch in stream:
            found.append(batch)
    steps = int(np.flatnonzero((shards == lost).any(1))[0])
    assert_same(found, expected[:steps])  # all that comes before, and nothing else


def test_what_is_not_there_is_an_error_at_once(serve, shards, tmp_path, cache):
    root = shutil.copytree(shards, tmp_path / "copy")
    (root / "train-000004.tar").unlink()
    server = serve(root)
    with pytest.raises(FetchError, match=r"train-000004.tar could not be fetched: it is not there"):
        take(ShardStream(server.address, "train", 150, cache=cache), 1)
    assert server.asked.count("train-000004.tar") <= 2  # in the background, and by whoever needed it


def test_cache_that_cannot_be_written_is_named(server, cache, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"data.cache=.*/file/cache cannot keep .*train.shards.npy: Not a directory"):
        ShardStream(server.address, "train", 26, cache=smaller(cache, folder=tmp_path / "file" / "cache"))


# The cache


def test_cache_stays_within_its_bound_over_whole_passes(serve, even, cache, monkeypatch):
    monkeypatch.setattr(remote, "WAIT_FOR_ROOM", 0.005)  # these shards last for milliseconds
    server, largest = serve(even), max(path.stat().st_size for path in even.glob("train-*.tar"))
    assert main(["--index", f"{server.address}/train-{{000000..000011}}.tar", "--out", str(cache.folder.parent / "index")]) == 0
    root = cache.folder.parent / "index"
    cache = smaller(cache, bytes=5 * largest)
    stream = ShardStream(root, "train", 4, cache=cache)
    assert stream.lanes == 2
    most = 0
    found = []
    for batch, _ in zip(stream, range(90), strict=False):  # three passes
        found.append(batch)
        most = max(most, kept_bytes(cache))
    assert 3 * largest < most <= cache.bytes
    assert_same(found, take(ShardStream(even, "train", 4, lanes=2), 90))


def test_only_what_nobody_has_open_is_removed_and_nothing_foreign(serve, even, cache):
    folder = RemoteFolder(serve(even).address, cache := smaller(cache, bytes=95_000))
    table = ShardIndex.load(even).split("train").table
    files = [(row["name"].decode(), row["sha256"].decode(), int(row["bytes"])) for row in table]
    cache.folder.mkdir()
    (cache.folder / "mine.tar").write_bytes(b"x" * 100_000)
    with folder.open(*files[0]) as held:
        for file in files[1:]:
            folder.open(*file).close()
        assert folder.keeps(files[0][1]) and folder.keeps(files[-1][1]) and not folder.keeps(files[1][1])
        assert kept_bytes(cache) <= cache.bytes
        assert held.read() == (even / files[0][0]).read_bytes()
    assert (cache.folder / "mine.tar").exists()


def test_fetch_ahead_finds_no_room_while_all_is_in_use_and_need_goes_beyond_the_bound(serve, even, cache, caplog):
    table = ShardIndex.load(even).split("train").table
    (a, b) = [(row["name"].decode(), row["sha256"].decode(), int(row["bytes"])) for row in table[:2]]
    folder = RemoteFolder(serve(even).address, smaller(cache, bytes=a[2] + 1))
    with folder.open(*a):
        assert not folder.fetch(*b, ahead=True) and not folder.keeps(b[1])
        with folder.open(*b):
            assert folder.keeps(a[1]) and "more than data.cache_bytes" in caplog.text


def test_what_a_killed_process_left_behind_is_fetched_anew(serve, even, cache):
    row = ShardIndex.load(even).split("train").table[0]
    file = (row["name"].decode(), row["sha256"].decode(), int(row["bytes"]))
    cache.folder.mkdir()
    (cache.folder / f"{file[1]}.partial").write_bytes(b"half of something")
    with RemoteFolder(serve(even).address, cache).open(*file) as found:
        assert found.read() == (even / file[0]).read_bytes()
    assert sorted(path.name for path in cache.folder.iterdir()) == [".lock", file[1]]


KEYS_OF = """
import sys
from pathlib import Path
from eae_dist.data.remote import Cache
from eae_dist.data.stream import ShardStream

root, folder, rank = sys.argv[1:]
cache = Cache(Path(folder), 10**9, timeout=10, retries=2)
stream = ShardStream(root, "train", 26, rank=int(rank), world=2, lanes=2, cache=cache)
for batch, _ in zip(stream, range(8)):
    print(*batch["key"], flush=True)
"""


def test_two_processes_share_a_cache(server, shards, cache):
    command = [sys.executable, "-c", KEYS_OF, server.address, str(cache.folder)]
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=rank_environment())
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=60)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    found = [" ".join(step).split() for step in zip(*said, strict=True)]
    assert found == [batch["key"] for batch in take(ShardStream(shards, "train", 26, lanes=2), 8)]
    asked = Counter(server.asked)
    assert asked.pop("index.json") == 2 and set(asked.values()) == {1}


# Start, resume, lanes


def test_start_and_resume_fetch_the_open_shards_first_and_say_so(serve, even, cache, caplog):
    caplog.set_level(logging.INFO, "eae_dist")
    server = serve(even)
    stream = ShardStream(server.address, "train", 4, lanes=2, start_step=17, cache=cache)
    batches = iter(stream)
    found = [next(batches)]
    (now,), _ = stream.order.rows(np.array([17]), 0, 2)
    following = stream.order.next_shards(19, np.arange(2))  # the thread that reads ahead is some batches further
    asked = [int(name[6:12]) for name in server.asked if name.endswith(".tar")]
    assert set(asked[: len(set(now))]) == set(now.tolist())
    assert set(asked) <= {*now.tolist(), *stream.order.next_shards(17, np.arange(2)).tolist(), *following.tolist()}
    assert "fetching 4 files, 0.1 MB, from http://127.0.0.1" in caplog.text
    found += [next(batches) for _ in range(3)]
    batches.close()
    assert_same(found, take(ShardStream(even, "train", 4, lanes=2), 21)[17:])


@pytest.mark.parametrize("room, lanes", [(24, 12), (12, 12), (11.9, 4), (8, 4), (7.9, 3), (4, 2), (2, 1)])
def test_default_lanes_are_as_many_as_the_cache_has_two_shards_for(serve, even, cache, room, lanes):
    largest = max(path.stat().st_size for path in even.glob("train-*.tar"))
    assert {path.stat().st_size for path in even.glob("train-*.tar")} == {largest}
    stream = ShardStream(serve(even).address, "train", 12, cache=smaller(cache, bytes=int(room * largest)))
    assert stream.lanes == lanes == stream.identity()["lanes"]


def test_cache_too_small_for_the_lanes_is_an_error_with_the_numbers(serve, even, cache):
    address = serve(even).address
    with pytest.raises(ValueError, match=r"data.cache_bytes=5000 cannot hold the open and the next shard.*1 lane"):
        ShardStream(address, "train", 4, cache=smaller(cache, bytes=5000))
    with pytest.raises(ValueError, match=r"data.cache_bytes=70000 .*: 4 lane.* or lower data.lanes"):
        ShardStream(address, "train", 4, lanes=4, cache=smaller(cache, bytes=70_000))
    with pytest.raises(ValueError, match=r"data.cache_bytes=70000 needs at most 1 ranks, got 2; .* raise data.cache_bytes"):
        ShardStream(address, "train", 3, rank=0, world=2, cache=smaller(cache, bytes=70_000))


def test_training_takes_its_cache_from_the_configuration(serve, even, tmp_path):
    settings = {"data.root": serve(even).address, "data.cache": tmp_path / "here", "data.cache_bytes": 200_000, "data.retries": 0}
    config = load_config([f"{key}={value}" for key, value in settings.items()] + ["train.global_batch=12"])
    stream = open_stream(config)
    assert stream.lanes == 3 and stream.index.tars.cache == Cache(tmp_path / "here", 200_000, 30.0, 0)


# Shards elsewhere, their index here


def test_index_of_shards_on_a_server_reads_as_the_folder_does(server, shards, tmp_path, cache, capsys):
    out = tmp_path / "out"
    names = "{train-{000000..000004},validation-000000,test-{000000..000001}}.tar"
    assert main(["--index", f"{server.address}/{names}", "--out", str(out)]) == 0
    assert set(Counter(server.asked).values()) == {1}  # each tar once
    info, local = (json.loads((root / "index.json").read_text()) for root in (out, shards))
    assert info.pop("base") == server.address and info | {"name": local["name"]} == local
    assert_same(take(ShardStream(out, "train", 26, cache=cache), 8), take(ShardStream(shards, "train", 26), 8))
    assert not list(out.glob("*.tar"))


def test_verify_reads_the_shards_on_their_server(server, tmp_path, capsys):
    assert main(["--index", f"{server.address}/test-{{000000..000001}}.tar", "--out", str(tmp_path / "out")]) == 0
    assert main(["--verify", str(tmp_path / "out")]) == 0
    server.faults = {"test-000001.tar": ["wrong byte"]}
    capsys.readouterr()
    assert main(["--verify", str(tmp_path / "out")]) == 1
    assert f"{server.address}/test-000001.tar is damaged: its sha256 is not the index's" in capsys.readouterr().out


def test_unusable_shard_is_named_by_its_address(serve, tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "train-000000.tar").write_bytes(b"no tar" * 1000)
    server = serve(tmp_path / "tars")
    assert main(["--index", f"{server.address}/train-000000.tar", "--out", str(tmp_path / "out")]) == 2
    assert f"{server.address}/train-000000.tar is truncated, damaged or not a tar" in capsys.readouterr().err
    assert not (tmp_path / "out" / "index.json").exists()


def test_pack_fetches_as_it_is_told(server, tmp_path, capsys):
    server.faults = {"test-000000.tar": ["500", "500"]}
    once = ["--set", "data.retries=1", "--set", f"data.cache={tmp_path}/fetched"]
    index = ["--index", f"{server.address}/test-{{000000..000001}}.tar", "--out", str(tmp_path / "out")]
    assert main([*index, *once]) == 2
    assert "in 2 tries" in (said := capsys.readouterr().err) and "raise data.retries=1" in said
    assert (tmp_path / "fetched").is_dir() and not (tmp_path / "home" / ".cache").exists()
    assert main([*index, "--set", "data.root=elsewhere"]) == 2
    assert "--set data.root=elsewhere is not about fetching shards; it takes data.cache, " in capsys.readouterr().err
    assert main([*index, *once]) == 0
    with pytest.raises(SystemExit):
        main(["--index", str(tmp_path), *once])
    assert "--set needs --index ADDRESS, --verify or webdataset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--index", "http://127.0.0.1:9/data", "--out", "OUT"], "a web server has no list of its files; name them"),
        (["--index", "http://127.0.0.1:9/train-{0..1.tar", "--out", "OUT"], "the braces do not match"),
        (["--index", "http://127.0.0.1:9/train-000000.tar"], "--out DIR is needed with --index ADDRESS"),
        (["--index", "DIR", "--out", "OUT"], "--out DIR is needed with --index ADDRESS"),
        (["--index", "pipe:cat train-000000.tar", "--out", "OUT"], "expected http://, https://, s3://, gs://, az://, hf://"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2 and words in capsys.readouterr().err


# What an index or a configuration must not do


@pytest.mark.parametrize(
    "address",
    [
        *("pipe:cat x", "file:///etc", "memory://bucket/x", "simplecache::http://host/x", "http:/host/x", "http://"),
        *("http://u:p@host/x", "http://host/../x", "http://host/%2e%2e/x", "http://host/x?y", "http://host/x#y"),
        *("s3://${HOME}/x", "http://host/a//b"),
    ],
)
def test_addresses_that_are_not_plain_are_refused(address, shards, tmp_path, cache):
    with pytest.raises(ValueError, match="^data.root=.* address"):
        checked_address(address, "data.root")
    if not address.startswith("http:/host"):
        with pytest.raises((ValueError, FileNotFoundError)):
            ShardStream(address, "train", 4, cache=cache)
    root = shutil.copytree(shards, tmp_path / "copy")
    info = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(info | {"base": address}))
    with pytest.raises(ValueError, match="index.json cannot be read as a shard index .base="):
        ShardStream(root, "train", 4, cache=cache)


def test_index_on_a_server_cannot_send_the_reader_elsewhere(serve, shards, tmp_path, cache):
    root = shutil.copytree(shards, tmp_path / "copy")
    info = json.loads((root / "index.json").read_text())
    (root / "index.json").write_text(json.dumps(info | {"base": "http://127.0.0.1:9/other"}))
    with pytest.raises(ValueError, match="the shards of an index on a server lie beside it"):
        ShardStream(serve(root).address, "train", 4, cache=cache)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/passwd", "http:x.tar", ".."])
def test_names_that_leave_the_address_are_refused(serve, shards, tmp_path, cache, name):
    root = shutil.copytree(shards, tmp_path / "copy")
    table = np.load(root / "train.shards.npy")
    table["name"][:] = name
    from eae_dist.data.indexing import _write_table

    info = json.loads((root / "index.json").read_text())
    info["splits"]["train"]["table_sha256"] = _write_table(root / "train.shards.npy", table)
    (root / "index.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="a shard is a plain file name"):
        take(ShardStream(serve(root).address, "train", 4, cache=cache), 1)


def test_checksum_that_is_a_path_is_refused(serve, shards, tmp_path, cache):
    root = shutil.copytree(shards, tmp_path / "copy")
    info = json.loads((root / "index.json").read_text())
    info["splits"]["train"]["table_sha256"] = "../../elsewhere"
    (root / "index.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match="gives '../../elsewhere' for a sha256"):
        ShardStream(serve(root).address, "train", 4, cache=cache)


# S3


@pytest.fixture
def bucket(even, monkeypatch) -> Iterator[str]:
    """The address of a folder in a bucket of a server on this machine, with the data set `even`."""
    pytest.importorskip("s3fs", reason="needs s3fs: pip install -e '.[s3]'")
    moto = pytest.importorskip("moto.server", reason="needs moto[server], as the extra dev has it")
    boto3 = pytest.importorskip("boto3")
    for key, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{key}", value)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
    servers.filesystem.cache_clear()
    client = boto3.client("s3")
    client.create_bucket(Bucket="images")
    for path in even.iterdir():
        client.upload_file(str(path), "images", f"some/even/{path.name}")
    yield "s3://images/some/even"
    servers.filesystem.cache_clear()
    server.stop()


STORES = {"gs": "gs://images/some/even", "az": "az://images/some/even", "hf": "hf://datasets/ada/images/even"}


@pytest.fixture(params=STORES)
def store(request, even, monkeypatch) -> Iterator[str]:
    """The address of a folder in a store in memory, which takes the place of that of the scheme, with the data set `even`."""

    class Store(MemoryFileSystem):
        protocol = request.param
        store, pseudo_dirs = {}, [""]
        cachable = False

        def _open(self, path, mode="rb", block_size=None, **options):
            opened.append({"block_size": block_size} | options)
            return super()._open(path, mode, block_size=block_size, **options)

    def filesystem(scheme: str, **options) -> Store:
        assert scheme == request.param
        return Store(**options)

    opened: list[dict] = []
    monkeypatch.setattr(fsspec, "filesystem", filesystem)
    servers.filesystem.cache_clear()
    Store().put(str(even), STORES[request.param], recursive=True)
    opened.clear()
    yield STORES[request.param]
    assert {options["block_size"] for options in opened} == ({0} if request.param == "hf" else {None})
    servers.filesystem.cache_clear()


def test_shards_in_other_stores_are_read_and_indexed_as_the_folder_is(store, even, cache, tmp_path, capsys):
    found = take(ShardStream(store, "train", 4, lanes=2, cache=cache), 30)
    assert_same(found, take(ShardStream(even, "train", 4, lanes=2), 30))
    with pytest.raises(FetchError, match="nowhere/index.json could not be fetched: it is not there"):
        ShardStream(f"{store}/nowhere", "train", 4, cache=cache)
    assert main(["--index", store, "--out", str(tmp_path / "out"), "--workers", "1"]) == 0, capsys.readouterr().err
    info, local = (json.loads((root / "index.json").read_text()) for root in (tmp_path / "out", even))
    assert info.pop("base") == store and info["splits"] == local["splits"]


def test_missing_package_of_a_store_is_named_with_what_installs_it(cache, monkeypatch):
    def missing(*_, **__):
        raise ImportError("no such package")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    for scheme, package in {"gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub", "s3": "s3fs"}.items():
        servers.filesystem.cache_clear()
        with pytest.raises(FetchError, match=rf"it needs {package}: pip install -e '\.\[{scheme}\]'"):
            ShardStream(f"{scheme}://images/x", "train", 4, cache=cache)


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_in_s3_read_as_the_folder_does(bucket, even, cache, workers):
    found = take(ShardStream(bucket, "train", 4, lanes=2, cache=cache, workers=workers), 30)
    assert_same(found, take(ShardStream(even, "train", 4, lanes=2), 30))
    with pytest.raises(FetchError, match="s3://images/nowhere/index.json could not be fetched: it is not there"):
        ShardStream("s3://images/nowhere", "train", 4, cache=cache)


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{train-{000000..000011},validation-{000000..000002}}.tar"])
def test_shards_in_s3_are_listed_and_indexed(bucket, even, tmp_path, pattern, capsys):
    assert main(["--index", bucket + pattern, "--out", str(tmp_path / "out"), "--workers", "1"]) == 0, capsys.readouterr().err
    info, local = (json.loads((root / "index.json").read_text()) for root in (tmp_path / "out", even))
    assert info.pop("base") == bucket and info["splits"] == local["splits"]
