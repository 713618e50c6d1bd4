"""The HTTP messages, as the OpenAPI description at /openapi.json shows them. Unknown keys and wrong types are refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eae_dist.latent.densities import DENSITIES

IMAGES, LATENTS, NEIGHBORS, STEPS, SEED = 64, 256, 100, 65, 2**53 - 1  # the most per request

Png = Annotated[
    str,
    Field(
        description="a PNG, JPEG or WebP file of the model's size, in base64",
        json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"},
    ),
]
Latent = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    Field(description="as many finite numbers as the model has latent dimensions"),
]
Key = Annotated[str, Field(description="the key of an image that the index holds", max_length=1000)]


class Request(BaseModel):
    """A request; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)


class EncodeRequest(Request):
    """Images to encode or to reconstruct."""

    images: list[Png] = Field(min_length=1, max_length=IMAGES)


class DecodeRequest(Request):
    """Latents to decode."""

    latents: list[Latent] = Field(min_length=1, max_length=LATENTS)


class SampleRequest(Request):
    """Samples to draw from a density."""

    density: Literal[tuple(DENSITIES)] = Field(  # type: ignore[valid-type]  # the names are known when the program runs
        "isotropic", description="evaluate must have fitted it, except isotropic"
    )
    seed: int = Field(0, ge=0, le=SEED, description="image i depends on seed and i alone")
    count: int = Field(16, ge=1, le=LATENTS)


class Point(Request):
    """A point of the latent space, given by exactly one of image, latent and key."""

    image: Png | None = None
    latent: Latent | None = None
    key: Key | None = None

    @model_validator(mode="after")
    def one_of_three(self) -> "Point":
        """Raises ValueError unless exactly one of the three is given."""
        if sum(value is not None for value in (self.image, self.latent, self.key)) != 1:
            raise ValueError("expected exactly one of image, latent and key")
        return self


class InterpolateRequest(Request):
    """Two points, and the number of images between them."""

    start: Point
    end: Point
    count: int = Field(8, ge=2, le=STEPS, description="images along the straight line between the latents, ends included")


class SearchRequest(Point):
    """A point whose neighbors are searched."""

    k: int = Field(10, ge=1, le=NEIGHBORS, description="how many neighbors, at most as many as the index has rows")


class Latents(BaseModel):
    """Latents of images."""

    latents: list[list[float]]


class Images(BaseModel):
    """Images as base64 PNG files."""

    images: list[Png]


class Reconstructions(Images):
    """Reconstructed images and their errors."""

    squared_error: list[float] = Field(description="per pixel and channel, of pixels in [0, 1]")


class ImagesWithLatents(Images):
    """Images and the latents that they were decoded from."""

    latents: list[list[float]]


class Named(BaseModel):
    """An image of the data set."""

    key: str
    label: str | None = Field(description="its class, if it has one")


class Neighbor(Named):
    """An image of the data set and its distance from the query."""

    distance: float = Field(description="in the latent space")


class Neighbors(BaseModel):
    """The neighbors of a query."""

    neighbors: list[Neighbor] = Field(description="nearest first")


class Keys(BaseModel):
    """Images of the data set."""

    images: list[Named]


class Health(BaseModel):
    """The state of the service."""

    status: Literal["ok"] = "ok"
    waiting: int = Field(description="images and latents that wait to be computed")


class Index(BaseModel):
    """The index that is searched."""

    kind: str
    rows: int
    split: str
    data: str


class Description(BaseModel):
    """The model that is served."""

    objective: str
    step: int
    checkpoint: str = Field(description="its folder's name")
    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    latent_dim: int
    densities: list[str]
    missing: dict[str, str] = Field(description="densities that cannot be drawn from, and why")
    index: Index | None
    limits: dict[str, int]


class Curves(BaseModel):
    """The numbers of the training run."""

    curves: dict[str, list[tuple[int, float]]] = Field(description="by name: images seen so far, value")


class Grids(BaseModel):
    """The pictures of the training run."""

    grids: dict[str, list[int]] = Field(description="by kind: the steps of which there is a picture")


class Problem(BaseModel):
    """The reason of an error."""

    detail: str
