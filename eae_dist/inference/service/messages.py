"""What goes over the wire, as the OpenAPI description at /openapi.json shows it. Unknown keys and wrong types are refused."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eae_dist.latent.densities import DENSITIES

IMAGES, LATENTS, NEIGHBORS, STEPS, SEED = 64, 256, 100, 65, 2**53 - 1  # the most of a request

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
    model_config = ConfigDict(extra="forbid", strict=True)


class EncodeRequest(Request):
    images: list[Png] = Field(min_length=1, max_length=IMAGES)


class DecodeRequest(Request):
    latents: list[Latent] = Field(min_length=1, max_length=LATENTS)


class SampleRequest(Request):
    density: Literal[tuple(DENSITIES)] = Field("isotropic", description="others than isotropic are those that evaluate fitted")
    seed: int = Field(0, ge=0, le=SEED, description="image i follows from seed and i alone")
    count: int = Field(16, ge=1, le=LATENTS)


class Point(Request):
    """Exactly one of the three."""

    image: Png | None = None
    latent: Latent | None = None
    key: Key | None = None

    @model_validator(mode="after")
    def one_of_three(self):
        if sum(value is not None for value in (self.image, self.latent, self.key)) != 1:
            raise ValueError("wanted is one of image, latent and key")
        return self


class InterpolateRequest(Request):
    start: Point
    end: Point
    count: int = Field(8, ge=2, le=STEPS, description="images along the straight line between the latents, ends included")


class SearchRequest(Point):
    k: int = Field(10, ge=1, le=NEIGHBORS, description="how many neighbors, at most as many as the index has rows")


class Latents(BaseModel):
    latents: list[list[float]]


class Images(BaseModel):
    images: list[Png]


class Reconstructions(Images):
    squared_error: list[float] = Field(description="per pixel and channel, of pixels in [0, 1]")


class ImagesWithLatents(Images):
    latents: list[list[float]]


class Named(BaseModel):
    key: str
    label: str | None = Field(description="its class, if it has one")


class Neighbor(Named):
    distance: float = Field(description="in the latent space")


class Neighbors(BaseModel):
    neighbors: list[Neighbor] = Field(description="nearest first")


class Keys(BaseModel):
    images: list[Named]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    waiting: int = Field(description="images and latents that wait to be computed")


class Index(BaseModel):
    kind: str
    rows: int
    split: str
    data: str


class Description(BaseModel):
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
    curves: dict[str, list[tuple[int, float]]] = Field(description="by name: images seen so far, value")


class Grids(BaseModel):
    grids: dict[str, list[int]] = Field(description="by kind: the steps of which there is a picture")


class Problem(BaseModel):
    detail: str
