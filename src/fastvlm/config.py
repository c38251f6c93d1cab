"""What a model is: frozen dataclasses, checked once, at construction."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal, Self, get_type_hints

from fastvlm.errors import ConfigError

Fit = Literal["pad", "crop", "stretch"]
"""How a picture becomes a square: black bars, centre crop, or both sides scaled apart."""

FITS: tuple[Fit, ...] = ("pad", "crop", "stretch")

_MAX_DIM = 65_536
_MAX_LAYERS = 1_024
_MAX_VOCAB = 4_194_304


class _Section:
    """Reading and writing shared by every section: an unknown key is an error, never dropped."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build the section, and the sections inside it, from plain JSON values.

        Raises:
            ConfigError: A key is unknown or missing, or a value is not what the field can hold.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"{cls.__name__} is read from a JSON object, got {type(values).__name__}")
        known = get_type_hints(cls)
        declared = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(values.keys() - declared.keys()):
            raise ConfigError(f"{cls.__name__} has no field {unknown[0]!r}; it has {sorted(declared)}")
        if missing := [name for name, f in declared.items() if f.default is MISSING and name not in values]:
            raise ConfigError(f"{cls.__name__} needs {missing[0]!r}")
        return cls(**{key: _read(known[key], value) for key, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `from_dict` reads back."""
        return asdict(self)  # type: ignore[call-overload]


def _read(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, _Section):
        return kind.from_dict(value)
    return tuple(value) if isinstance(value, list) else value


def _check_counts(section: object, **limits: int) -> None:
    for name, limit in limits.items():
        value = getattr(section, name)
        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, int) or isinstance(item, bool) or not 0 < item <= limit:
                raise ConfigError(f"{type(section).__name__}.{name} must be between 1 and {limit}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class VisionConfig(_Section):
    """FastViTHD: five stages, the first three convolutional, the last two attention (arXiv 2412.13303, 3.2)."""

    image_size: int = 1024
    depths: tuple[int, ...] = (2, 12, 24, 4, 2)
    dims: tuple[int, ...] = (96, 192, 384, 768, 1536)
    mlp_ratio: int = 4
    head_dim: int = 32
    num_attention_stages: int = 2
    clip_dim: int | None = None  # width of the CLIP embedding, when the checkpoint kept its head
    is_reparameterised: bool = True  # False: branches and BatchNorm, the form that learns from a random start
    fit: Fit = "pad"

    def __post_init__(self) -> None:
        """Check sizes against each other."""
        _check_counts(self, image_size=_MAX_DIM, depths=_MAX_LAYERS, dims=_MAX_DIM, mlp_ratio=64, head_dim=_MAX_DIM)
        if len(self.depths) != len(self.dims) or len(self.dims) < 2:
            raise ConfigError(f"depths {self.depths} and dims {self.dims} must name the same two or more stages")
        if self.image_size % self.stride:
            raise ConfigError(f"image_size must be a multiple of {self.stride}, got {self.image_size}")
        if type(self.num_attention_stages) is not int or not 0 <= self.num_attention_stages <= len(self.dims):
            raise ConfigError(
                f"num_attention_stages must be between 0 and {len(self.dims)}, got {self.num_attention_stages!r}"
            )
        for dim in self.dims[len(self.dims) - self.num_attention_stages :]:
            if dim % self.head_dim:
                raise ConfigError(f"dims {self.dims}: attention stages need multiples of head_dim {self.head_dim}")
        for small, large in zip(self.dims, self.dims[1:], strict=False):
            if large % small:
                raise ConfigError(f"dims {self.dims}: each stage's width must be a multiple of the one before")
        if self.clip_dim is not None:
            _check_counts(self, clip_dim=_MAX_DIM)
        if self.fit not in FITS:
            raise ConfigError(f"fit must be one of {FITS}, got {self.fit!r}")

    @property
    def stride(self) -> int:
        """Pixels per feature: 4 in the stem, 2 before each later stage."""
        return int(4 * 2 ** (len(self.dims) - 1))

    @property
    def out_dim(self) -> int:
        """`C`: the last convolution doubles the width."""
        return 2 * self.dims[-1]

    @property
    def num_image_tokens(self) -> int:
        """`N` for a square of `image_size`: 256 for 1024 x 1024 pixels."""
        return int((self.image_size // self.stride) ** 2)


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(_Section):
    """Two linear layers."""

    in_dim: int = 3072
    out_dim: int

    def __post_init__(self) -> None:
        """Check both widths."""
        _check_counts(self, in_dim=_MAX_DIM, out_dim=_MAX_DIM)


@dataclass(frozen=True, kw_only=True)
class LanguageConfig(_Section):
    """Qwen2 (arXiv 2407.10671)."""

    dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    mlp_dim: int
    vocab_size: int
    tied: bool
    rope_theta: float = 1_000_000.0
    norm_eps: float = 1e-6
    max_positions: int = 32_768

    def __post_init__(self) -> None:
        """Check heads against widths."""
        _check_counts(
            self,
            dim=_MAX_DIM,
            num_layers=_MAX_LAYERS,
            num_heads=_MAX_LAYERS,
            num_kv_heads=_MAX_LAYERS,
            mlp_dim=1_048_576,
            vocab_size=_MAX_VOCAB,
            max_positions=16_777_216,
        )
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ConfigError(f"dim ({self.dim}) must be an even multiple of num_heads ({self.num_heads})")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(f"num_heads ({self.num_heads}) must be divisible by num_kv_heads ({self.num_kv_heads})")

    @property
    def head_dim(self) -> int:
        """`E`."""
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class Config(_Section):
    """A whole model."""

    vision: VisionConfig
    projector: ProjectorConfig
    language: LanguageConfig
    image_token_id: int = 151_646  # what stands in the prompt where image embeddings go

    def __post_init__(self) -> None:
        """Check that each part's output is the next part's input."""
        if not isinstance(self.image_token_id, int) or self.image_token_id < 0:
            raise ConfigError(f"image_token_id must be a token's id, got {self.image_token_id!r}")
        if self.projector.in_dim != self.vision.out_dim:
            raise ConfigError(
                f"projector.in_dim ({self.projector.in_dim}) must be vision's width {self.vision.out_dim}"
            )
        if self.projector.out_dim != self.language.dim:
            raise ConfigError(
                f"projector.out_dim ({self.projector.out_dim}) must be language.dim ({self.language.dim})"
            )


def table_rows(num_ids: int) -> int:
    """Rows of an embedding table for so many ids: rounded up to a multiple of 64, as processors like them."""
    return -(-num_ids // 64) * 64


_QWEN2 = {
    "0.5b": LanguageConfig(
        dim=896, num_layers=24, num_heads=14, num_kv_heads=2, mlp_dim=4864, vocab_size=151_936, tied=True
    ),
    "1.5b": LanguageConfig(
        dim=1536, num_layers=28, num_heads=12, num_kv_heads=2, mlp_dim=8960, vocab_size=151_936, tied=True
    ),
    "7b": LanguageConfig(
        dim=3584, num_layers=28, num_heads=28, num_kv_heads=4, mlp_dim=18_944, vocab_size=152_064, tied=False
    ),
}

PRESETS: dict[str, Config] = {
    **{
        name: Config(vision=VisionConfig(), projector=ProjectorConfig(out_dim=language.dim), language=language)
        for name, language in _QWEN2.items()
    },
    "nano": Config(
        vision=VisionConfig(
            image_size=384, depths=(1, 2, 4, 2, 1), dims=(32, 64, 128, 256, 512), is_reparameterised=False
        ),
        projector=ProjectorConfig(in_dim=1024, out_dim=192),
        language=LanguageConfig(
            dim=192,
            num_layers=4,
            num_heads=6,
            num_kv_heads=2,
            mlp_dim=416,
            vocab_size=1024,
            tied=True,
            max_positions=2048,
        ),
    ),
}
"""Whole models by short name."""

ENCODERS: dict[str, VisionConfig] = {
    "mci3": VisionConfig(clip_dim=768),
    "mci4": VisionConfig(image_size=1024, depths=(2, 12, 24, 4, 4), dims=(128, 256, 512, 1024, 2048), clip_dim=768),
}
"""Vision encoders on their own: FastViTHD is MobileCLIP-S3's mci3, mci4 is MobileCLIP2-S4's."""
