"""The service: answers against the model's own functions, joined batches, and everything that a client can get wrong."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections import Counter
from contextlib import ExitStack, contextmanager

import httpx
import numpy as np
import pytest
import requests
import schemathesis
import torch
import uvicorn
from accelerate import PartialState
from accelerate.state import AcceleratorState
from conftest import ROOT, rank_environment
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.strategies import randoms
from PIL import Image
from run_folders import save_run
from world_cases import configured

import eae_dist
from eae_dist.encode import encode
from eae_dist.inference.encoded_dataset import EncodedDataset
from eae_dist.inference.service import guard
from eae_dist.inference.service.app import create_app
from eae_dist.inference.service.batching import Batcher, Busy, Closed
from eae_dist.inference.service.connections import limited_protocol
from eae_dist.inference.service.guard import POLICY, Guard
from eae_dist.inference.service.images import images_from_text
from eae_dist.inference.service.model import ServedModel
from eae_dist.latent.densities import save_density
from eae_dist.latent.gaussian import Gaussian
from eae_dist.serve import main

D, SHAPE = 5, (1, 16, 16)
STEP = 1 / 255 / 2 + 1e-6  # half a step of a pixel: what uint8 rounds away


@pytest.fixture(scope="module")
def world(shards, tmp_path_factory):
    """A run with a fitted mvg, a line of metrics and a picture; and the latents of its data."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    folder = tmp_path_factory.mktemp("serve")
    run = save_run(folder / "run", configured(shards, "eae", "evaluate.batch=64"))
    space = encode(run, folder / "latents", [])
    density = Gaussian()
    density.fit(torch.from_numpy(np.array(space.read("train", "latents"))))
    save_density(density, run / "evaluation" / "densities" / "mvg.safetensors", space.about["model_sha256"])
    records = [{"step": s, "images": 26 * s, "loss": 1 / s, "rank_data_wait": [0.1]} for s in range(1, 1201)]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(record) for record in records) + '\n{"step": 1201, "im')
    (run / "samples").mkdir()
    for name in ("step-00000004-samples.png", "step-00000004-secrets.png", "notes.txt"):
        (run / "samples" / name).write_bytes(png(np.zeros((4, 4), np.uint8)))
    yield run, folder / "latents"
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def served(world) -> ServedModel:
    return ServedModel(*world, ["index.kind=flat"])


@pytest.fixture(scope="module")
def model(world):
    return eae_dist.load(world[0])


@pytest.fixture
def batcher(served):
    made = Batcher(served.computations, 64, 1_024)
    yield made
    made.close()


@pytest.fixture
def app(served, batcher) -> Guard:
    return create_app(served, batcher)


def answers(app, *requests, **options) -> list[httpx.Response]:
    """What the application answers to (method, path, JSON or bytes), all asked at once."""

    async def asked():
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.request(method, path, **body(*rest)) for method, path, *rest in requests))

    def body(content=None) -> dict:
        if content is None or isinstance(content, bytes):
            return {"content": content, "headers": {"content-type": "application/json", **options.get("headers", {})}}
        return {"json": content, **options}

    return asyncio.run(asked())


def post(app, path: str, content, **options) -> httpx.Response:
    return answers(app, ("POST", path, content), **options)[0]


def get(app, path: str, **options) -> httpx.Response:
    return answers(app, ("GET", path), **options)[0]


def png(pixels: np.ndarray, kind: str = "png") -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def digits(count: int) -> np.ndarray:
    """uint8 [count, 1, 16, 16]."""
    return np.random.default_rng(count).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def texts(images: np.ndarray) -> list[str]:
    return [text(png(image[0])) for image in images]


def pixels_of(answer: httpx.Response) -> torch.Tensor:
    """The images of an answer, [b, 1, 16, 16] in [0, 1]."""
    assert answer.status_code == 200, answer.text
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in answer.json()["images"]]
    return torch.from_numpy(np.stack(images)[:, None]) / 255


def close(a, b, atol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-4, atol=atol, check_dtype=False)


# Answers.


def test_answers_are_those_of_the_model(app, model):
    images = digits(3)
    unit = torch.from_numpy(images) / 255
    latents = torch.randn(4, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(post(app, "/encode", {"images": texts(images)}).json()["latents"], model.encode(unit))
        close(pixels_of(post(app, "/decode", {"latents": latents.tolist()})), model.decode(latents), STEP)
        answer = post(app, "/reconstruct", {"images": texts(images)})
        again = model.reconstruct(unit)
        close(pixels_of(answer), again, STEP)
        close(answer.json()["squared_error"], (again - unit).square().mean((1, 2, 3)))
        for density in ("isotropic", "mvg"):
            answer = post(app, "/sample", {"density": density, "seed": 3, "count": 7})
            close(pixels_of(answer), model.sample(7, density, seed=3), STEP)
            close(model.decode(torch.tensor(answer.json()["latents"])), model.sample(7, density, seed=3))
        ends = {"start": {"image": texts(images)[0]}, "end": {"latent": latents[0].tolist()}, "count": 3}
        answer = post(app, "/interpolate", ends)
        start = model.encode(unit[:1])[0]
        middle = torch.stack([start, (start + latents[0]) / 2, latents[0]])
        close(answer.json()["latents"], middle)
        close(pixels_of(answer), model.decode(middle), STEP)


def test_neighbors_are_the_nearest_latents_however_one_asks(app, served, world):
    space = served.space
    latents, keys = (np.array(space.folder.read("train", what)) for what in ("latents", "keys"))
    image = space.images("train", np.array([17]))[0]
    distances = np.linalg.norm(latents - latents[17], axis=1)
    order = np.argsort(distances, kind="stable")[:6]
    for asked in ({"key": keys[17].decode()}, {"latent": latents[17].tolist()}, {"image": text(png(image[0]))}):
        near = post(app, "/search", asked | {"k": 6}).json()["neighbors"]
        assert [one["key"] for one in near] == [keys[row].decode() for row in order]
        close([one["distance"] for one in near], distances[order], 2e-3)  # float32 in squares: the root of 1e-6 near 0
        assert near[0]["label"] == str(space.folder.read("train", "labels")[17])
    answer = get(app, f"/image?key={near[1]['key']}")
    assert answer.headers["content-type"] == "image/png"
    shown = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert (shown == space.images("train", order[1:2])[0, 0]).all()
    keyed = get(app, "/keys?count=9&seed=2").json()["images"]
    assert len({one["key"] for one in keyed}) == 9 and keyed == get(app, "/keys?count=9&seed=2").json()["images"]


def test_every_key_finds_its_row(served):
    assert [served.row_of(served.key_of(row)) for row in range(served.index.n)] == list(range(served.index.n))
    for key in ("", "000001x", "00000", "~", "\x00", "000001\x00", "é", "\ud800"):
        with pytest.raises(KeyError):
            served.row_of(key)


def test_images_are_read_by_many_at_once(app, served):
    keys = [served.key_of(row) for row in range(150)] * 2
    read = answers(app, *(("GET", f"/image?key={key}") for key in keys))
    assert {answer.status_code for answer in read} == {200}
    assert [answer.content for answer in read[:150]] == [answer.content for answer in read[150:]]


def test_gray_models_see_gray_in_color_files_and_in_others_than_png(app):
    image = digits(1)[0, 0]
    color = np.repeat(image[:, :, None], 3, 2)
    lossless = io.BytesIO()
    Image.fromarray(color).save(lossless, "webp", lossless=True)
    plain, *others = (
        post(app, "/encode", {"images": [text(data)]}).json()["latents"] for data in (png(image), png(color), lossless.getvalue())
    )
    for other in others:
        close(other, plain, 0.02)  # gray from equal channels may be a step off


def test_run_folder_shows_curves_and_pictures(app):
    curves = get(app, "/curves").json()["curves"]
    assert list(curves) == ["loss"] and len(curves["loss"]) == 400
    assert curves["loss"][-1] == [26 * 1200, pytest.approx(1 / 1200)] and curves["loss"][0][0] == 26 * 3
    assert get(app, "/grids").json() == {"grids": {"samples": [4]}}
    assert get(app, "/grids/samples/4").content == png(np.zeros((4, 4), np.uint8))
    for path in ("samples/5", "secrets/4", "samples/-4", "..%2f..%2fconfig.yaml/4", "samples/..%2f4"):
        assert get(app, f"/grids/{path}").status_code in (404, 422)


def test_description_says_what_can_be_asked(app):
    described = get(app, "/model").json()
    assert (described["objective"], described["step"], described["latent_dim"], described["image_shape"]) == (
        "eae",
        4,
        D,
        [*SHAPE],
    )
    assert described["densities"] == ["isotropic", "mvg"] and set(described["missing"]) == {"gmm", "two_stage", "flow"}
    assert described["index"] == {"kind": "flat", "rows": 150, "split": "train", "data": "shards"}
    assert get(app, "/health").json() == {"status": "ok", "waiting": 0}


# Batches.


class Blocked:
    """The batcher of a model whose thread is held until `release`; `calls`: rows of each call after that."""

    def __init__(self, served: ServedModel, batch: int = 64, waiting: int = 1_024):
        self.calls, self._hold, self._started = [], threading.Event(), threading.Event()
        computations = {name: self._counted(name, compute) for name, compute in served.computations.items()}
        self.batcher = Batcher(computations | {"hold": self._held}, batch, waiting)
        self.batcher.submit("hold", np.zeros((1, 1)))
        assert self._started.wait(30)

    def release(self) -> None:
        self._hold.set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.release()
        self.batcher.close()

    def _counted(self, name, compute):
        def counted(rows, *arguments):
            self.calls.append((name, *arguments, len(rows)))
            return compute(rows, *arguments)

        return counted

    def _held(self, rows):
        self._started.set()
        self._hold.wait(30)
        return (rows,)


def test_requests_of_one_kind_become_one_forward_pass_and_answer_as_alone(served, app):
    latents = np.random.default_rng(0).normal(size=(12, 3, D)).tolist()
    decodes = [("POST", "/decode", {"latents": rows}) for rows in latents]
    others = [
        ("POST", "/sample", {"count": 2, "seed": seed, "density": density}) for seed in (1, 2) for density in ("isotropic", "mvg")
    ]
    searches = [("POST", "/search", {"latent": rows[0], "k": k}) for rows in latents[:4] for k in (2, 3)]
    requests = [*decodes, *others, *searches]
    alone = [answers(app, request)[0] for request in requests]
    with Blocked(served) as blocked:
        threading.Thread(target=wait_until, args=(lambda: blocked.batcher.waiting == 36 + 8 + 8, blocked.release)).start()
        together = answers(create_app(served, blocked.batcher), *requests)
        wanted = [("decode", 36), ("sample", "isotropic", 4), ("sample", "mvg", 4), ("search", 2, 4), ("search", 3, 4)]
        assert sorted(blocked.calls, key=str) == wanted
    for one, other in zip(alone[:16], together[:16], strict=True):
        close(pixels_of(one), pixels_of(other), 1 / 255 + 1e-6)  # rounding can move a pixel by a step
    assert [one.json() for one in alone[16:]] == [other.json() for other in together[16:]]


def wait_until(holds, then) -> None:
    turn = threading.Event()
    for _ in range(3_000):
        if holds():
            break
        turn.wait(0.01)
    then()


def test_joined_batches_are_bounded_and_first_come_is_first_served(served):
    with Blocked(served, batch=8) as blocked:
        rows = np.zeros((3, D), np.float32)
        jobs = [blocked.batcher.submit(name, rows) for name in ("decode", "decode", "decode", "decode")]
        jobs.append(blocked.batcher.submit("decode", np.zeros((20, D), np.float32)))
        jobs[1].cancel()
        blocked.release()
        assert [len(job.result(30)[0]) for place, job in enumerate(jobs) if place != 1] == [3, 3, 3, 20]
        assert [call[-1] for call in blocked.calls] == [6, 3, 8, 8, 4]


def test_a_full_queue_is_429_and_the_service_goes_on(served):
    with Blocked(served, waiting=10) as blocked:
        app = create_app(served, blocked.batcher)
        waiting = blocked.batcher.submit("decode", np.zeros((8, D), np.float32))
        refused = post(app, "/sample", {"count": 3})
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["detail"].startswith("the service is busy: 8 images wait; ask again in ")
        assert get(app, "/health").json() == {"status": "ok", "waiting": 8}
        blocked.release()
        waiting.result(30)
        assert post(app, "/sample", {"count": 3}).status_code == 200


def test_a_failing_computation_fails_its_requests_alone(served):
    def fails(latents):
        raise MemoryError("no room")

    batcher = Batcher(served.computations | {"decode": fails}, 64, 100)
    app = create_app(served, batcher)
    failed = post(app, "/decode", {"latents": [[0] * D]})
    assert failed.status_code == 500 and failed.json() == {"detail": "the service failed (MemoryError); its log says more"}
    assert post(app, "/sample", {"count": 1}).status_code == 200
    batcher.close()
    assert post(app, "/sample", {"count": 1}).status_code == 503


def test_what_waits_when_the_service_ends_is_told(served):
    with Blocked(served) as blocked:
        waiting = blocked.batcher.submit("decode", np.zeros((1, D), np.float32))
        threading.Timer(0.05, blocked.release).start()
        blocked.batcher.close()
        with pytest.raises(Closed):
            waiting.result(30)
        with pytest.raises(Closed):
            blocked.batcher.submit("decode", np.zeros((1, D), np.float32))
    assert issubclass(Busy, RuntimeError)


# Bad input.


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, extra: bytes = b"") -> bytes:
    """A small PNG that claims so many gray pixels, all there as compressed zeros."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(bytes(1 << 20), 9)) + chunk(b"IEND", b"")


WHOLE = png(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
BAD_IMAGES = {
    "a decompression bomb": (bomb(60_000, 60_000), "decompression bomb"),
    "a large image": (bomb(9_000, 9_000), "9000x9000 are more than 256 pixels"),
    "a bomb of text": (bomb(16, 16, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80 << 20), 9))), "Decompressed data too large"),
    "a truncated PNG": (WHOLE[:-40], "truncated"),
    "a damaged PNG": (WHOLE[:60] + bytes(8) + WHOLE[68:], "not usable"),
    "a header alone": (WHOLE[:33], "not usable"),
    "another size": (png(np.zeros((16, 8), np.uint8)), "8x16; expected a file of 16x16 pixels"),
    "16 bits": (png(np.zeros((16, 16), np.uint16)), "more than 8 bits a channel"),
    "text": (b"GIF89a is what this is not", "not usable"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n", "not an image"),
    "nothing": (b"", "not an image"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_image_is_422_with_its_reason(app, data, reason):
    requests = [("POST", path, {"images": [text(WHOLE), text(data)]}) for path in ("/encode", "/reconstruct")]
    requests += [
        ("POST", "/search", {"image": text(data)}),
        ("POST", "/interpolate", {"start": {"image": text(data)}, "end": {"key": "000001"}}),
    ]
    for answer in answers(app, *requests):
        assert answer.status_code == 422 and reason in answer.json()["detail"], answer.text
    assert get(app, "/health").status_code == 200


@pytest.mark.parametrize(
    ("path", "content", "status", "reason"),
    [
        ("/encode", {"images": ["%%%"]}, 422, "image 0 is not usable: not base64"),
        ("/encode", {"images": ["é"]}, 422, "not base64"),
        ("/encode", {"images": []}, 422, "images: List should have at least 1 item"),
        ("/encode", {"images": [text(WHOLE)] * 65}, 422, "images: List should have at most 64 items"),
        ("/encode", {"image": text(WHOLE)}, 422, "image: Extra inputs are not permitted"),
        ("/decode", {"latents": [[0] * D, [0] * (D - 1)]}, 422, "latent 1 has 4 dimensions, the model has 5"),
        ("/decode", {"latents": [[0.0] * 4 + ["1"]]}, 422, "latents.0.4: Input should be a valid number"),
        ("/decode", {"latents": [[0] * 4 + [1e300]]}, 422, "latent 0 holds numbers that are not finite in float32"),
        ("/decode", b'{"latents": [[0, 0, 0, 0, NaN]]}', 422, "latents.0.4: Input should be a finite number"),
        ("/decode", b'{"latents": [[0, 0, 0, 0, 1e999]]}', 422, "latents.0.4: Input should be a finite number"),
        ("/decode", b'{"latents": [[0, 0, 0, 0, ' + b"9" * 5000 + b"]]}", 400, "body"),
        ("/decode", b'{"latents": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", 400, "body"),
        ("/decode", b"{", 422, "the body is not JSON"),
        ("/decode", b"\xff\xfe", 422, "the body is not JSON"),
        ("/sample", {"density": "gnn"}, 422, "density: Input should be 'isotropic', 'mvg', 'gmm', 'two_stage' or 'flow'"),
        ("/sample", {"density": "gmm"}, 409, "the density gmm was not fitted to these weights; run `python -m eae_dist.evaluate"),
        ("/sample", {"count": 0}, 422, "count: Input should be greater than or equal to 1"),
        ("/sample", {"count": 257}, 422, "count: Input should be less than or equal to 256"),
        ("/sample", {"seed": -1}, 422, "seed: Input should be greater"),
        ("/sample", {"seed": 1.5}, 422, "seed: Input should be a valid integer"),
        ("/search", {"latent": [0] * D, "k": 0}, 422, "k: Input should be greater"),
        ("/search", {"latent": [0] * D, "k": 101}, 422, "k: Input should be less"),
        ("/search", {"latent": [3e38] * D}, 422, "the latent is so long that distances from it are not finite"),
        ("/search", {"k": 3}, 422, "expected exactly one of image, latent and key"),
        ("/search", {"key": "000001", "latent": [0] * D}, 422, "expected exactly one of image, latent and key"),
        ("/search", {"key": "../../etc/passwd"}, 404, "there is no image with the key '../../etc/passwd' in shards, split train"),
        ("/search", b'{"key": "\\ud800"}', 422, "key"),
        ("/interpolate", {"start": {"key": "000001"}, "end": {"key": "x"}}, 404, "there is no image with the key 'x'"),
        ("/interpolate", {"start": {"key": "000001"}, "end": {"key": "000002"}, "count": 66}, 422, "count"),
    ],
)
def test_bad_request_is_refused_with_its_reason(app, path, content, status, reason):
    answer = post(app, path, content)
    assert (answer.status_code, reason in answer.json()["detail"]) == (status, True), answer.text


def test_latents_whose_pixels_are_no_numbers_are_refused(served):
    def decode(latents):
        pixels, finite = served.decode(latents)
        return pixels, finite & (np.abs(latents).max(1) < 1e30)

    batcher = Batcher(served.computations | {"decode": decode}, 64, 100)
    answer = post(create_app(served, batcher), "/decode", {"latents": [[0] * D, [3e38] * D]})
    assert answer.status_code == 422 and answer.json()["detail"].startswith("latent 1 is decoded to pixels that are not finite")
    batcher.close()


def test_more_neighbors_than_rows_are_refused(app, served, monkeypatch):
    monkeypatch.setattr(served.index, "n", 7)
    answer = post(app, "/search", {"latent": [0] * D, "k": 8})
    assert answer.status_code == 422 and answer.json()["detail"].startswith("k=8 must be a whole number from 1 to the 7 rows")


def test_paths_and_keys_of_the_url_reach_no_file(app):
    for path in (
        "/image?key=..%2f..%2findex.json",
        "/image?key=%2fetc%2fpasswd",
        "/image?key=%00",
        "/page/page.js",
        "/..%2fserve.py",
    ):
        assert get(app, path).status_code == 404, path
    assert get(app, "/decode").status_code == 405


def test_without_latents_everything_else_works(world):
    served = ServedModel(world[0], None, [])
    batcher = Batcher(served.computations, 64, 100)
    app = create_app(served, batcher)
    assert get(app, "/model").json()["index"] is None
    for answer in answers(app, ("POST", "/search", {"latent": [0] * D}), ("GET", "/keys"), ("GET", "/image?key=000001")):
        assert answer.status_code == 404 and "has no index; start it with --latents DIR" in answer.json()["detail"]
    assert len(pixels_of(post(app, "/sample", {"count": 2}))) == 2
    batcher.close()


def test_a_large_request_is_413_before_it_is_read(app, served, batcher):
    small = Guard(app.app, request_bytes=1_000)
    assert post(small, "/decode", b" " * 1_001).status_code == 413
    happened, body = [], bytearray()

    async def receive():
        happened.append("bytes")
        return {"type": "http.request", "body": b" " * 300, "more_body": len(happened) < 100}

    async def send(message):
        happened.append(message["type"])
        body.extend(message.get("body", b""))

    scope = {"type": "http", "method": "POST", "path": "/decode", "headers": [(b"content-type", b"application/json")]}
    asyncio.run(small(scope, receive, send))
    assert "a request may have at most 1,000 bytes" in json.loads(body)["detail"]
    answered = happened.index("http.response.body")
    assert happened[:answered].count("bytes") < 10 and happened.count("bytes") > 90  # the rest is taken in, and not kept
    assert post(small, "/decode", {"latents": [[0] * D]}).status_code == 200


def test_a_request_that_does_not_come_is_408(app, monkeypatch):
    monkeypatch.setattr(guard, "REQUEST_SECONDS", 0.01)
    monkeypatch.setattr(guard, "UNREAD_SECONDS", 0.01)
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/decode", "headers": []}
    asyncio.run(app(scope, asyncio.Event().wait, send))
    assert sent[0]["status"] == 408 and b"did not arrive within" in sent[1]["body"]


def test_description_names_every_status_of_an_answer(app):
    described = get(app, "/openapi.json").json()["paths"]["/decode"]["post"]["responses"]
    source = "".join((ROOT / "eae_dist" / "inference" / "service" / name).read_text() for name in ("app.py", "guard.py"))
    answered = set(re.findall(r"(?:HTTPException|_problem|refuse)\((?:receive, send_guarded, )?(\d{3})", source))
    assert {"408", "413", "429", "500", "503"} <= answered <= set(described)


def test_a_body_that_does_not_say_that_it_is_json_is_415(app):
    answer = post(app, "/sample", b"{}", headers={"content-type": "text/plain"})  # a form of a foreign page could send it
    assert answer.status_code == 415 and answer.json()["detail"] == "content-type must be application/json, got text/plain"


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/json;charset=utf-8", 200),
        ("application/jsonp", 415),
        ("application/json-seq", 415),
        ("application/jsonx; charset=utf-8", 415),
        ("text/json", 415),
        ("multipart/form-data", 415),
        ("application/x-www-form-urlencoded", 415),
    ],
)
def test_content_type_is_compared_whole(app, kind, status):
    assert post(app, "/sample", b'{"count": 1}', headers={"content-type": kind}).status_code == status


@pytest.mark.parametrize(
    "path", ["/health", "/", "/page.js", "/model", "/keys?count=2", "/image?key=000003", "/curves", "/grids"]
)
def test_head_is_answered_as_get_without_the_body(app, path):
    head, whole = answers(app, ("HEAD", path), ("GET", path))
    assert head.status_code == whole.status_code == 200 and head.content == b"" != whole.content
    assert head.headers["content-type"] == whole.headers["content-type"] and "content-security-policy" in head.headers
    assert answers(app, ("HEAD", "/nothing"))[0].status_code == 404 and answers(app, ("HEAD", "/sample"))[0].status_code == 405


async def hello(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    await send({"type": "http.response.body", "body": b"hello"})


@contextmanager
def listening(most_of_one: int | None, header_seconds: float):
    """The port of a server that answers hello, with these limits."""
    server = uvicorn.Server(
        uvicorn.Config(hello, http=limited_protocol(most_of_one, header_seconds), log_config=None, lifespan="off")
    )
    with socket.create_server(("127.0.0.1", 0)) as bound:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        yield bound.getsockname()[1]
        server.should_exit = True
        thread.join()


def until_closed(connection: socket.socket) -> bytes:
    connection.settimeout(60)
    return b"".join(iter(lambda: connection.recv(10_000), b""))


HELLO = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"G", b"GET / HTTP/1.1\r\n", HELLO[:-2], HELLO[:-1], HELLO + HELLO[:-2], HELLO + b"GE"])
def test_header_that_does_not_come_ends_its_connection(sent):
    with listening(None, 0.5) as port, ExitStack() as open_:
        silent = [open_.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(5)]
        for connection in silent:
            connection.sendall(sent)
        for connection in silent:
            answer = until_closed(connection)
            assert answer.count(b"HTTP/1.1 200 ") == sent.count(HELLO)
            assert b"HTTP/1.1 408 Request Timeout" in answer and answer.endswith(b'did not arrive in time"}')


def test_request_in_time_is_answered_however_slowly_its_header_came():
    with listening(None, 30) as port, socket.create_connection(("127.0.0.1", port)) as slow:
        for byte in HELLO:
            slow.sendall(bytes([byte]))
        for _ in range(2):  # the second time on the same connection
            answer = b""
            while not answer.endswith(b"hello"):  # header and body may come one after the other
                answer += slow.recv(10_000)
            assert answer.startswith(b"HTTP/1.1 200 ")
            slow.sendall(HELLO)


def test_connections_of_one_address_are_limited_and_counted_down_again():
    with listening(3, 60) as port, ExitStack() as open_:
        connect = lambda: open_.enter_context(socket.create_connection(("127.0.0.1", port)))  # noqa: E731
        held = []
        for _ in range(3):
            held.append(connect())
            held[-1].sendall(HELLO)
            assert held[-1].recv(10_000).startswith(b"HTTP/1.1 200 ")
        assert until_closed(connect()).startswith(b"HTTP/1.1 503 Service Unavailable")
        held[0].sendall(HELLO.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        until_closed(held[0])
        again = connect()
        again.sendall(HELLO)
        assert again.recv(10_000).startswith(b"HTTP/1.1 200 ")


def test_a_local_service_answers_to_local_names_only(served, batcher):
    app = create_app(served, batcher, hosts=("localhost", "127.0.0.1", "[::1]"))
    for host in ("localhost:8000", "127.0.0.1:80", "[::1]:8000", "[::1]", "LOCALHOST"):
        assert get(app, "/health", headers={"host": host}).status_code == 200
    for host in ("evil.example", "127.0.0.1.evil.example:8000", ""):
        assert get(app, "/health", headers={"host": host}).status_code == 400


def test_a_thousand_malformed_requests_leave_the_service_whole(app):
    """A quarter break the service's own description in the ways that schemathesis knows; the others are those, damaged again."""
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen: list[int] = []
    loop = asyncio.new_event_loop()
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://test")
    often = settings(
        max_examples=250,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    @often
    @given(case=schema.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE), random=randoms(use_true_random=False))
    def ask(case, random):
        request = requests.Request(**case.as_transport_kwargs(base_url="http://test")).prepare()
        body = request.body.encode() if isinstance(request.body, str) else request.body or b"{}"
        place = random.randrange(len(body) + 1)
        damaged = [
            body[:place],
            body[:place] + random.randbytes(2) + body[place + 1 :],
            re.sub(rb"[\d.]+", lambda _: random.choice([b"NaN", b"1e999", b"-1", b"9" * 400, b"null", b"[[[]]]"]), body),
        ]
        headers = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
        for content in (body, *damaged):
            answer = loop.run_until_complete(client.request(request.method, request.url, content=content, headers=headers))
            seen.append(answer.status_code)
            assert answer.status_code < 500, (request.method, request.url, content)
            assert answer.status_code < 400 or isinstance(answer.json()["detail"], str)

    ask()
    loop.run_until_complete(client.aclose())
    loop.close()
    assert len(seen) >= 1_000 and sum(400 <= status for status in seen) > 500, Counter(seen)
    assert get(app, "/health").json() == {"status": "ok", "waiting": 0}
    assert len(pixels_of(post(app, "/sample", {"count": 2}))) == 2


# The page.


def test_the_page_loads_nothing_from_other_hosts(app):
    for path in ("/", "/page.css", "/page.js"):
        answer = get(app, path)
        assert answer.status_code == 200 and answer.headers["content-security-policy"] == POLICY
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", answer.text))
        assert addresses <= {"http://www.w3.org/2000/svg"}  # the name of SVG's elements
        assert not re.search(r"\bon\w+=|style=|@import|javascript:", answer.text)  # the policy forbids them
    assert get(app, "/docs").status_code == 404
    for directive in ("default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'"):
        assert directive in POLICY
    assert "http" not in POLICY and "unsafe" not in POLICY


def test_the_page_makes_colors_gray_as_the_service_does():
    script = (ROOT / "eae_dist" / "inference" / "service" / "page" / "page.js").read_text()
    weights = re.search(r"\((\d+) \* data\[at\] \+ (\d+) \* data\[at \+ 1\] \+ (\d+) \* data\[at \+ 2\] \+ (\d+)\) >> 16", script)
    red, green, blue, half = map(int, weights.groups())
    colors = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    seen = images_from_text([text(png(colors))], (1, 64, 64))[0, 0]
    shown = (colors.astype(np.int64) @ [red, green, blue] + half) >> 16
    np.testing.assert_array_equal(shown, seen)
    again = np.repeat(seen[:, :, None], 3, 2)  # the page sends what it shows
    np.testing.assert_array_equal(images_from_text([text(png(again))], (1, 64, 64))[0, 0], seen)


def test_every_reference_of_the_page_is_there():
    folder = ROOT / "eae_dist" / "inference" / "service" / "page"
    html, script = (folder / "index.html").read_text(), (folder / "page.js").read_text()
    ids = set(re.findall(r'\bid="([\w-]+)"', html))
    assert set(re.findall(r'\$\("([\w-]+)"\)', script)) <= ids
    assert set(re.findall(r'(?:for|aria-labelledby|href)="#?([\w-]+)"', html)) <= ids


# The command.


def test_command_serves_until_it_is_told_to_end(world, tmp_path):
    command = [sys.executable, "-m", "eae_dist.serve", "--ckpt", str(world[0]), "--latents", str(world[1]), "--port", "0"]
    how = {"stderr": subprocess.PIPE, "text": True, "env": rank_environment(), "cwd": tmp_path}
    with ExitStack() as at_last:
        terminated, interrupted = (at_last.enter_context(subprocess.Popen(command, **how)) for _ in range(2))
        at_last.callback(lambda: (terminated.kill(), interrupted.kill()))  # where an assertion fails
        for process, number in ((terminated, signal.SIGTERM), (interrupted, signal.SIGINT)):
            said = []
            for line in process.stderr:
                said.append(line)
                if match := re.search(r"serving eae, step 4 at (http://127\.0\.0\.1:(\d+)) ", line):
                    break
            else:
                raise AssertionError("".join(said))
            with httpx.Client(base_url=match[1]) as client:
                assert client.get("/health").json()["status"] == "ok"
                assert len(client.post("/sample", json={"count": 3}).json()["images"]) == 3
                assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
            with socket.create_connection(("127.0.0.1", int(match[2]))) as broken:
                broken.sendall(b"\x00\xff no HTTP\r\n\r\n")
                assert broken.recv(100).startswith(b"HTTP/1.1 400 ")
            with socket.create_connection(("127.0.0.1", int(match[2]))) as large:
                header = b"POST /decode HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50000000\r\n\r\n"
                large.sendall(header + bytes(50_000_000))  # to the end, before it listens
                answer = b"".join(iter(lambda: large.recv(10_000), b""))
                assert answer.startswith(b"HTTP/1.1 413 ") and b"a request may have at most 8,388,608 bytes" in answer
            with pytest.raises(SystemExit, match=f"error: --host=127.0.0.1 --port={match[2]} cannot be bound: "):
                main(["--ckpt", str(world[0]), "--port", match[2]])
            process.send_signal(number)
            rest = process.stderr.read()
            assert process.wait(30) == 0 and "Traceback" not in rest, rest


def test_latents_of_other_weights_are_refused(world, shards, tmp_path):
    other = save_run(tmp_path / "other", configured(shards, "eae", "train.seed=9"))
    with pytest.raises(ValueError, match="holds the latents of other weights than .*; give theirs, or encode again"):
        ServedModel(other, world[1], [])
    assert EncodedDataset(world[1], None, []).folder.d == D


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--latents", "{latents}", "train.seed=3"], "error: only evaluate"),
        (["--latents", "{run}"], "error: .*run holds no latents"),
        (["--latents", "{latents}", "index.metric=cosine"], "error: index.metric=cosine: the service shows distances"),
        (["--port", "70000"], "error: --port=70000 must lie in"),
        (["--host", "256.0.0.1"], "error: --host=256.0.0.1 --port=8000 cannot be bound"),
    ],
)
def test_wrong_options_are_one_line(world, arguments, message):
    run, latents = world
    given = [argument.format(run=run, latents=latents) for argument in arguments]
    with pytest.raises(SystemExit, match=message):
        main(["--ckpt", str(run), *(["--port", "0"] if "--port" not in given and "--host" not in given else []), *given])


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_a_missing_extra_is_named(world, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "eae_dist.inference.service.app")
    with pytest.raises(SystemExit, match=f"error: the service needs {package}; pip install -e '.\\[serve\\]'"):
        main(["--ckpt", str(world[0]), "--port", "0"])


def test_weights_that_make_no_numbers_are_refused(world, shards, tmp_path):
    from eae_dist.training import checkpoint as checkpoints

    opened = checkpoints.open_checkpoint(world[0])
    state = {
        name: torch.full_like(value, torch.nan) if "decoder" in name else value for name, value in opened.model_state().items()
    }
    checkpoints.save(tmp_path / "nan", opened.config, state, {}, opened.state)
    with pytest.raises(ValueError, match="makes values that are not finite; was it trained to the end"):
        ServedModel(tmp_path / "nan", None, [])
