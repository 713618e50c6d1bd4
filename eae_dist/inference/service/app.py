"""The HTTP application. It checks every request before anything is computed, and answers it.

Every error is {"detail": reason}: 4xx if the client can correct it, 429 with Retry-After if too many requests wait.
"""

import asyncio
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

import eae_dist
from eae_dist.errors import UserError
from eae_dist.inference.service import messages as m
from eae_dist.inference.service.batching import Batcher, Busy, Closed
from eae_dist.inference.service.guard import REQUEST_BYTES, REQUEST_SECONDS, Guard
from eae_dist.inference.service.images import images_from_text, png_of, texts_of
from eae_dist.inference.service.model import ServedModel
from eae_dist.inference.service.run_folder import RunFolder
from eae_dist.inference.trained_model import sample_seeds
from eae_dist.latent.index import LONGEST, LatentIndex

PAGE = {"/": ("index.html", "text/html"), "/page.css": ("page.css", "text/css"), "/page.js": ("page.js", "text/javascript")}
PROBLEMS = {
    400: "the body is not JSON, or the host name is not accepted",
    404: "the key, picture or index does not exist",
    408: f"the request did not arrive within {REQUEST_SECONDS} s",
    409: "the density was not fitted",
    413: "the request has too many bytes",
    415: "the content type is not JSON",
    422: "a value is not valid, and why",
    429: "too many requests wait; Retry-After gives the seconds to wait",
    500: "the service failed at this request and continues",
    503: "the service is stopping, or has too many connections",
}


def create_app(served: ServedModel, batcher: Batcher, hosts: tuple[str, ...] | None = None) -> Guard:
    """Returns the service of a model. The caller closes the batcher.

    hosts: host names by which the service may be called, None for any.
    """
    app = FastAPI(
        title="eae_dist",
        version=eae_dist.__version__,
        description="A trained autoencoder. Images go in and come out as base64 PNG files.",
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
        responses={status: {"model": m.Problem, "description": text} for status, text in PROBLEMS.items()},
    )
    run = RunFolder(served.checkpoint.path)
    _answer_errors(app)
    _serve_page(app)

    async def compute(name: str, rows: np.ndarray, *arguments: Any) -> tuple[np.ndarray, ...]:
        return await asyncio.wrap_future(batcher.submit(name, rows, *arguments))

    async def read_images(texts: Sequence[str]) -> np.ndarray:
        try:
            return await run_in_threadpool(images_from_text, texts, served.image_shape)
        except UserError as error:
            raise HTTPException(422, str(error)) from error

    async def latents_of(points: Sequence[m.Point]) -> np.ndarray:
        """Returns float32 [b, d]; the latents of all images are computed together."""
        latents = np.empty((len(points), served.latent_dim), np.float32)
        for place, point in enumerate(points):
            if point.key is not None:
                latents[place] = await run_in_threadpool(served.latent_of, row_of(point.key))
            elif point.latent is not None:
                latents[place] = checked_latents([point.latent], served.latent_dim)
        if places := [place for place, point in enumerate(points) if point.image is not None]:
            images = [point.image for point in points if point.image is not None]
            (latents[places],) = await compute("encode", await read_images(images))
        return latents

    async def decode(latents: np.ndarray) -> list[str]:
        pixels, finite = await compute("decode", latents)
        if not finite.all():
            raise HTTPException(422, f"latent {np.argmin(finite)} is decoded to pixels that are not finite; it is too far from 0")
        return await run_in_threadpool(texts_of, pixels)

    def row_of(key: str) -> int:
        need_index()
        try:
            return served.row_of(key)
        except KeyError as error:
            space = served.space
            assert space is not None  # the index is of its latents
            raise HTTPException(
                404, f"there is no image with the key {key!r} in {space.folder.about['data']}, split {space.split}"
            ) from error

    def need_index() -> LatentIndex:
        if served.index is None:
            raise HTTPException(404, "the service has no index; start it with --latents DIR, a folder that `encode` wrote")
        return served.index

    @app.post("/encode")
    async def encode(request: m.EncodeRequest) -> m.Latents:
        """Returns the latents of images; variational models give the means."""
        (latents,) = await compute("encode", await read_images(request.images))
        return m.Latents(latents=latents.tolist())

    @app.post("/decode")
    async def decode_latents(request: m.DecodeRequest) -> m.Images:
        """Returns the images of latents."""
        return m.Images(images=await decode(checked_latents(request.latents, served.latent_dim)))

    @app.post("/reconstruct")
    async def reconstruct(request: m.EncodeRequest) -> m.Reconstructions:
        """Returns images that were encoded and decoded again."""
        if served.unreconstructed:
            raise HTTPException(409, served.unreconstructed)
        pixels, errors = await compute("reconstruct", await read_images(request.images))
        return m.Reconstructions(images=await run_in_threadpool(texts_of, pixels), squared_error=errors.tolist())

    @app.post("/sample")
    async def sample(request: m.SampleRequest) -> m.ImagesWithLatents:
        """Returns decoded samples of a density: those of `generate` and of `model.sample` for this seed."""
        if request.density not in served.densities:
            raise HTTPException(409, served.missing[request.density])
        seeds = sample_seeds(request.seed, np.arange(request.count))
        pixels, latents = await compute("sample", seeds, request.density)
        return m.ImagesWithLatents(images=await run_in_threadpool(texts_of, pixels), latents=latents.tolist())

    @app.post("/interpolate")
    async def interpolate(request: m.InterpolateRequest) -> m.ImagesWithLatents:
        """Returns images along the straight line between two latents."""
        start, end = await latents_of([request.start, request.end])
        t = np.linspace(0, 1, request.count, dtype=np.float32)[:, None]
        between = start * (1 - t) + end * t
        return m.ImagesWithLatents(images=await decode(between), latents=between.tolist())

    @app.post("/search")
    async def search(request: m.SearchRequest) -> m.Neighbors:
        """Returns the nearest images of the data set, in the latent space."""
        n = need_index().n
        if request.k > n:
            raise HTTPException(422, f"k={request.k} must be a whole number from 1 to the {n:,} rows of the index")
        asked = await latents_of([request])
        if not np.linalg.norm(asked.astype(np.float64)) < LONGEST:
            raise HTTPException(422, "the latent is so long that distances from it are not finite in float32")
        distances, rows = (found[0] for found in await compute("search", asked, request.k))
        near = zip(rows.tolist(), distances.tolist(), strict=True)
        return m.Neighbors(neighbors=[m.Neighbor(**named(row), distance=distance) for row, distance in near])

    def named(row: int) -> dict[str, Any]:
        return {"key": served.key_of(row), "label": served.label_of(row)}

    @app.get("/keys")
    async def keys(
        count: Annotated[int, Query(ge=1, le=m.LATENTS)] = 16, seed: Annotated[int, Query(ge=0, le=m.SEED)] = 0
    ) -> m.Keys:
        """Returns the keys of random images of the data set."""
        n = need_index().n
        rows = np.random.default_rng(seed).choice(n, min(count, n), replace=False)
        return m.Keys(images=[m.Named(**named(row)) for row in rows.tolist()])

    @app.get("/image", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def image(key: Annotated[str, Query(max_length=1000)]) -> Response:
        """Returns an image of the data set as PNG."""
        row = row_of(key)
        return _png(await run_in_threadpool(lambda: png_of(served.image_of(row))), seconds=3600)

    @app.get("/curves")
    async def curves() -> m.Curves:
        """Returns the numbers of the training run."""
        return m.Curves(curves=await run_in_threadpool(run.curves))

    @app.get("/grids")
    async def grids() -> m.Grids:
        """Lists the pictures of the training run."""
        found = await run_in_threadpool(run.grids)
        return m.Grids(grids={kind: list(steps) for kind, steps in found.items()})

    @app.get("/grids/{kind}/{step}", response_class=Response, responses={200: {"content": {"image/png": {}}}})
    async def grid(kind: str, step: int) -> Response:
        """Returns a picture of the training run as PNG."""
        path = (await run_in_threadpool(run.grids)).get(kind, {}).get(step)
        if path is None:
            raise HTTPException(404, f"there is no picture of {kind!r} of step {step}; /grids lists them")
        return _png(await run_in_threadpool(path.read_bytes), seconds=60)

    @app.get("/model")
    async def model() -> m.Description:
        """Describes the model that is served."""
        space, limits = served.space, {"images": m.IMAGES, "latents": m.LATENTS, "neighbors": m.NEIGHBORS, "steps": m.STEPS}
        index = None
        if served.index is not None and space is not None:
            data = space.folder.about["data"]
            index = m.Index(kind=served.index.kind, rows=served.index.n, split=space.split, data=data)
        return m.Description(
            objective=served.config.objective.name,
            step=served.checkpoint.state["step"],
            checkpoint=served.checkpoint.path.name,
            image_shape=served.image_shape,
            latent_dim=served.latent_dim,
            densities=list(served.densities),
            missing=served.missing,
            index=index,
            limits=limits | {"bytes": REQUEST_BYTES},
        )

    @app.get("/health")
    async def health() -> m.Health:
        """Says that the service works, and how much waits."""
        return m.Health(waiting=batcher.waiting)

    return Guard(app, hosts)


def checked_latents(rows: Sequence[Sequence[float]], dimensions: int) -> np.ndarray:
    """Returns float32 [b, d].

    Raises HTTPException 422, which names the row, for a row of another length and for numbers beyond float32.
    """
    for number, row in enumerate(rows):
        if len(row) != dimensions:
            raise HTTPException(422, f"latent {number} has {len(row)} dimensions, the model has {dimensions}")
    with np.errstate(over="ignore"):
        latents = np.array(rows, np.float64).astype(np.float32)
    if not (finite := np.isfinite(latents).all(1)).all():
        raise HTTPException(422, f"latent {np.argmin(finite)} holds numbers that are not finite in float32")
    return latents


def _png(data: bytes, seconds: int) -> Response:
    return Response(data, media_type="image/png", headers={"cache-control": f"private, max-age={seconds}"})


def _serve_page(app: FastAPI) -> None:
    def serve(path: str, name: str, kind: str) -> None:
        content = (files("eae_dist.inference.service") / "page" / name).read_bytes()

        @app.get(path, include_in_schema=False)
        async def page() -> Response:
            return Response(content, media_type=kind, headers={"cache-control": "no-cache"})

    for path, (name, kind) in PAGE.items():
        serve(path, name, kind)


def _answer_errors(app: FastAPI) -> None:
    """Answers errors with a reason as text.

    FastAPI's own answer repeats the input, which may hold NaN and then is not JSON.
    """

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        kind = request.headers.get("content-type", "nothing")
        if request.method == "POST" and kind.partition(";")[0].strip().lower() != "application/json":
            return _problem(415, f"content-type must be application/json, got {kind}")
        if any(problem["type"] == "json_invalid" for problem in error.errors()):
            return _problem(422, "the body is not JSON")
        problems = [f"{'.'.join(map(str, problem['loc'][1:])) or 'body'}: {problem['msg']}" for problem in error.errors()]
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        return _problem(422, "; ".join(problems[:5]) + more)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        return _problem(error.status_code, error.detail)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        return _problem(429, str(error), {"retry-after": str(error.seconds)})

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        return _problem(500, f"the service failed ({type(error).__name__}); its log says more")

    @app.exception_handler(Closed)
    async def closed(request: Request, error: Closed) -> Response:
        return _problem(503, str(error))


def _problem(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    text = reason.encode("utf-8", "backslashreplace").decode()  # a key may hold half a surrogate pair
    return JSONResponse({"detail": text}, status, headers)
