"""ModelCard: everything that a caller must know about a model, as data.

The same JSON lies beside the model as `card.json` and inside the ONNX metadata under `nsam_card`; the runtime
refuses a model that does not fit its card, naming the field.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsam.runtime.errors import ModelError

#: Meta's normalisation for SAM (segment_anything.build_sam), for RGB in 0..255.
SAM_MEAN = (123.675, 116.28, 103.53)
SAM_STD = (58.395, 57.12, 57.375)

_TOLD_PX = 448
#: What the graph's input calls its height and width where it takes several sizes.
SIZE_DIMENSION = "size"


@dataclass(frozen=True)
class InputSpec:
    """What the network takes: uint8 (N, size, size, 3) at `mpp` micrometres per pixel, `size` one of `sizes`."""

    #: Ascending; a slide's cut takes the one that suits it. Those below 448 are for images that they hold whole.
    sizes: tuple[int, ...] = (224, 336, 448, 560, 672, 784, 896, 1008, 1120)
    mpp: float = 0.25
    multiple_of: int = 16
    mean: tuple[float, float, float] = SAM_MEAN
    std: tuple[float, float, float] = SAM_STD
    colour_order: str = "RGB"

    @property
    def size(self) -> int:
        """The one in which proofs, timings and batches are told: 448 px, or the smallest where that is none of them."""
        return _TOLD_PX if _TOLD_PX in self.sizes else self.sizes[0]

    @property
    def other_sizes(self) -> tuple[int, ...]:
        """All but that."""
        return tuple(size for size in self.sizes if size != self.size)

    def scaled(self, batch: int, size: int) -> int:
        """As many tiles of `size` as have the pixels of a batch of `self.size`; at least one, at most the batch."""
        return max(1, batch * self.size**2 // max(size, self.size) ** 2)


@dataclass(frozen=True)
class OutputSpec:
    """What it returns: float32 (N, len(channels), size / stride, size / stride)."""

    channels: tuple[str, ...] = ("nucleus", "distance")
    #: `logit` passes a sigmoid to become a probability; `distance` is 0 at a nucleus's border and 1 at its centre.
    kinds: tuple[str, ...] = ("logit", "distance")
    stride: int = 2


@dataclass(frozen=True)
class PostSpec:
    """How maps become nuclei; the thresholds come from an inner validation split, never from a test fold."""

    nucleus_threshold: float = 0.5  # probability above which a pixel is nucleus
    seed_prominence: float = 0.1  # by which a peak of the distance must stand out to start a nucleus
    smooth_um: float = 0.5  # sigma by which the distance is smoothed before
    min_area_um2: float = 6.0  # smaller pieces are dropped
    min_probability: float = 0.0  # mean over a nucleus's pixels below which it is dropped
    tile_halo_px: int = 56  # network input px at each tile side whose result is thrown away
    block_halo_um: float = 24.0  # context of a block; a nucleus wider than this may change with the blocks


@dataclass(frozen=True)
class FileEntry:
    """One file of the model directory."""

    sha256: str
    precision: str


@dataclass(frozen=True)
class ModelCard:
    """The contract between a model and its callers."""

    name: str
    version: str
    licence: str
    input: InputSpec = field(default_factory=InputSpec)
    output: OutputSpec = field(default_factory=OutputSpec)
    post: PostSpec = field(default_factory=PostSpec)
    training: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    tool_versions: dict[str, str] = field(default_factory=dict)
    #: Precisions that passed their gate; `auto` takes no other.
    proven: tuple[str, ...] = ("fp32",)
    #: Links of the export's chain that failed their gate and were kept all the same.
    failed_links: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = self.input.sizes
        if self.input.multiple_of < 1:
            raise ModelError(f"card field `input.multiple_of`: must be 1 or more, is {self.input.multiple_of}")
        if (
            not sizes
            or list(sizes) != sorted(set(sizes))
            or sizes[0] <= 0
            or any(size % self.input.multiple_of for size in sizes)
        ):
            raise ModelError(
                f"card field `input.sizes`: must be multiples of {self.input.multiple_of}, ascending, are {sizes}"
            )
        if not 0.05 <= self.input.mpp <= 4:
            raise ModelError(f"card field `input.mpp`: must lie in .05 to 4 µm/px, is {self.input.mpp}")
        if self.input.colour_order != "RGB":
            raise ModelError(f"card field `input.colour_order`: must be RGB, is {self.input.colour_order}")
        if not self.output.channels or self.output.channels[0] != "nucleus":
            raise ModelError(f"card field `output.channels`: must begin with nucleus, is {self.output.channels}")
        if len(self.output.kinds) != len(self.output.channels):
            raise ModelError("card field `output.kinds`: must have one entry for each channel")
        if self.output.stride < 1 or any(size % self.output.stride for size in sizes):
            raise ModelError(f"card field `output.stride`: must divide {sizes}, is {self.output.stride}")
        self._check_post()

    def _check_post(self) -> None:
        sizes, post = self.input.sizes, self.post
        if not 0 < post.nucleus_threshold < 1:
            raise ModelError(f"card field `post.nucleus_threshold`: must lie in 0 to 1, is {post.nucleus_threshold}")
        for name in ("seed_prominence", "min_probability"):
            if not 0 <= getattr(post, name) <= 1:
                raise ModelError(f"card field `post.{name}`: must lie in 0 to 1, is {getattr(post, name)}")
        for name in ("smooth_um", "min_area_um2", "block_halo_um"):
            if not 0 <= getattr(post, name) < math.inf:
                raise ModelError(f"card field `post.{name}`: must be 0 or more, is {getattr(post, name)}")
        halo = post.tile_halo_px
        if halo < 0 or halo % self.output.stride or 2 * halo >= sizes[0]:
            raise ModelError(
                "card field `post.tile_halo_px`: must be a multiple of the stride and less than half of "
                f"{sizes[0]} px, is {halo}"
            )

    def shown_at(self, mpp: float | None) -> ModelCard:
        """The card of a network that is shown tissue at another scale than its own, µm/px; None: its own.

        Raises:
            ModelError: the scale is beyond half or twice its own.
        """
        own = self.input.mpp
        if mpp is None:
            return self
        if not own / 2 <= mpp <= 2 * own:
            raise ModelError(
                f"{mpp:g} µm/px: too far from the {own:g} of this network; give it {own / 2:g} to {2 * own:g}"
            )
        return dataclasses.replace(self, input=dataclasses.replace(self.input, mpp=mpp))

    def to_json(self) -> str:
        """The card as JSON text with a final newline, keys in the order of the fields."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "card.json") -> ModelCard:
        """Read a card; `source` names it in errors.

        Raises:
            ModelError: not JSON, an unknown, missing or ill-typed field; the message names it.
        """
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"`{source}`: not a model card, its JSON is broken ({error})") from error
        if not isinstance(data, dict):
            raise ModelError(f"`{source}`: not a model card, a JSON object is wanted")
        parts = {"input": InputSpec, "output": OutputSpec, "post": PostSpec}
        for key, part in parts.items():
            if key in data:
                data[key] = _build(part, data[key], f"{key}.", source)
        files = data.get("files", {})
        if not isinstance(files, dict):
            raise ModelError(f"`{source}`: card field `files` must be an object")
        data["files"] = {name: _build(FileEntry, entry, f"files.{name}.", source) for name, entry in files.items()}
        card: ModelCard = _build(cls, data, "", source)
        return card

    @classmethod
    def read(cls, model_dir: Path) -> ModelCard:
        """Read `card.json` of a model directory.

        Raises:
            ModelError: no such file, or one that `from_json` refuses.
        """
        path = model_dir / "card.json"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(
                f"`{model_dir}`: no readable card.json in it; name a folder made by nsam-export"
            ) from error
        return cls.from_json(text, str(path))

    def verify_file(self, model_dir: Path, name: str) -> Path:
        """Path of a listed file after its hash was checked.

        Raises:
            ModelError: the file is not listed, missing, or another than the card says.
        """
        if name not in self.files:
            raise ModelError(f"`{model_dir / name}`: the card does not list it; export the model again")
        path = model_dir / name
        if not path.is_file():
            raise ModelError(f"`{path}`: the card lists it, but it is missing; export the model again")
        found, wanted = sha256_of(path), self.files[name].sha256
        if found != wanted:
            raise ModelError(
                f"`{path}`: card field `files.{name}.sha256` is {wanted[:12]}…, the file has {found[:12]}…; "
                "the file was changed or cut: copy or export the model again"
            )
        return path


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _build(cls: type[Any], data: Any, prefix: str, source: str) -> Any:
    """A dataclass from its JSON object, with errors that name the field; lists become tuples."""
    if not isinstance(data, dict):
        raise ModelError(f"`{source}`: card field `{prefix.rstrip('.')}` must be an object")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise ModelError(f"`{source}`: unknown card field `{prefix}{key}`; made by a newer nsam?")
    values = {}
    for name, spec in fields.items():
        if name not in data:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise ModelError(f"`{source}`: card field `{prefix}{name}` is missing")
            continue
        value = data[name]
        if isinstance(value, list):
            value = tuple(value)
        if not _fits(value, str(spec.type)):
            raise ModelError(f"`{source}`: card field `{prefix}{name}` must be {spec.type}, is {value!r}")
        values[name] = value
    return cls(**values)


def _fits(value: Any, annotation: str) -> bool:
    if annotation == "int":
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation == "str":
        return isinstance(value, str)
    if annotation == "tuple[float, float, float]":
        return isinstance(value, tuple) and len(value) == 3 and all(_fits(v, "float") for v in value)
    if annotation in ("tuple[str, ...]", "tuple[int, ...]"):
        return isinstance(value, tuple) and all(_fits(v, annotation[6:9]) for v in value)
    return True
