"""The architecture of a network, as it travels inside a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

NORM_NAMES = ("gn", "bn", "in", "none")
ACTIVATION_NAMES = ("silu", "relu", "mish")
CONDITIONINGS = ("bias", "embedding", "both")


@dataclass(frozen=True)
class UNetConfig:
    """The architecture. It travels inside the checkpoint, so loading one needs no flag.

    `patch_size` p > 1 folds every p × p square of pixels into channels before the first convolution, and out again
    after the last (Hoogeboom et al. 2023, "simple diffusion", §3.3): a network for few operations. With `haar` the
    channels are a square's Haar wavelets instead of its pixels, for p = 2.
    `attention_levels` counts resolutions from the top: 0 is the image's own size over `patch_size`, 1 is half of it.
    `num_classes` None is an unconditional network; with `null_class` one more class, numbered `num_classes`,
    stands for "no class" (classifier-free guidance, Ho & Salimans 2022). The class acts as a bias in every residual
    block, as an embedding added to the time's, or both. An attention has `num_heads` heads, or, where `head_channels`
    is not 0, heads of that width. The fields from `norm_groups` on are conventions in which other projects' networks
    differ.
    """

    image_channels: int = 3
    image_size: tuple[int, int] = (32, 32)  # height, width
    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    time_emb_dim: int = 512
    num_classes: int | None = None
    null_class: bool = False
    class_conditioning: str = "bias"  # bias, embedding, both
    dropout: float = 0.1
    norm: str = "gn"  # gn, bn, in, none
    activation: str = "silu"  # silu, relu, mish
    num_heads: int = 1
    head_channels: int = 0
    learned_variance: bool = False  # twice the channels out: the prediction, then v of Nichol & Dhariwal 2021, eq. 15
    scale_shift_norm: bool = False
    resblock_updown: bool = False  # residual blocks change the resolution, instead of a convolution alone
    norm_groups: int = 32  # of gn, or its largest divisor that divides the channels; single channels lose time's bias
    norm_eps: float = 1e-5
    downsample_padding: int = 1  # 1 on every side; 0: one row below and one column to the right, as Ho's TensorFlow
    time_freq_shift: int = 0  # frequencies end at 10000^-((half - 1) / (half - shift))
    time_scale: float = 1.0  # of t before it is embedded
    time_table: int = 0  # not 0: t is embedded by a stored table with so many rows, not by sines and cosines
    initial_pad: int = 0  # zeros on every side of the image, whatever its size, which are cut off again
    num_heads_upsample: int = 0  # not 0: the number of heads on the way up

    patch_size: int = 1
    haar: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "channel_mults", "attention_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be (height, width), not {self.image_size}")
        limits = [
            ("image_channels", self.image_channels, 1, 4),
            *(("image_size", side, 1, 4096) for side in self.image_size),
            ("base_channels", self.base_channels, 2, 4096),
            ("number of channel_mults", len(self.channel_mults), 1, 8),
            *(("channel_mults", mult, 1, 64) for mult in self.channel_mults),
            ("num_res_blocks", self.num_res_blocks, 1, 16),
            ("time_emb_dim", self.time_emb_dim, 1, 16384),
            ("num_heads", self.num_heads, 1, 4096),
            ("head_channels", self.head_channels, 0, 65536),
            ("downsample_padding", self.downsample_padding, 0, 1),
            ("time_freq_shift", self.time_freq_shift, 0, 1),
            ("time_table", self.time_table, 0, 100_000),
            ("norm_groups", self.norm_groups, 1, 4096),
            ("initial_pad", self.initial_pad, 0, 64),
            ("num_heads_upsample", self.num_heads_upsample, 0, 4096),
            ("patch_size", self.patch_size, 1, 16),
            ("num_classes", 1 if self.num_classes is None else self.num_classes, 1, 100_000),
        ]
        for name, value, low, high in limits:
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value}")
        if self.base_channels % 2:
            raise ValueError(f"base_channels must be even (sines and cosines), not {self.base_channels}")
        for name, chosen, valid in (
            ("norm", self.norm, NORM_NAMES),
            ("activation", self.activation, ACTIVATION_NAMES),
            ("class_conditioning", self.class_conditioning, CONDITIONINGS),
        ):
            if chosen not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, not {chosen!r}")
        if not 0 < self.norm_eps < 1 or not 0 < self.time_scale < 1e6:
            raise ValueError(f"norm_eps {self.norm_eps} or time_scale {self.time_scale} is out of range")
        for level in {*self.attention_levels, len(self.channel_mults) - 1}:  # the last: the middle's
            if 0 <= level < len(self.channel_mults):
                channels = self.base_channels * self.channel_mults[level]
                heads = (self.num_heads, self.num_heads_upsample or 1)
                if any(channels % (self.head_channels or count) for count in heads):
                    raise ValueError(f"{channels} channels cannot be divided among the attention heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not all(0 <= level < len(self.channel_mults) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} are level indices: "
                f"they must be between 0 and {len(self.channel_mults) - 1}"
            )
        if self.haar not in (False, True) or (self.haar and self.patch_size != 2):
            raise ValueError(f"haar is true or false, and needs patch_size 2, not {self.patch_size}")
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class needs num_classes")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.image_channels, *self.image_size)

    @property
    def multiple(self) -> int:
        """Of which height and width are multiples inside the network; it pads them."""
        return int(self.patch_size * 2 ** (len(self.channel_mults) - 1))


@dataclass(frozen=True)
class LucidrainsConfig:
    """The architecture of lucidrains/denoising-diffusion-pytorch, whose network is another than ours.

    There is one level for each of `dim_mults`, of width `dim` times that, after a convolution to `init_dim` channels.
    `full_attention` says which levels have full instead of linear attention; `heads` and `head_channels` have a number
    for each level, and then the middle's. `memory` is the number of learned keys and values of every attention.
    `strided` halves by a 4×4 convolution with stride 2; otherwise squares of 2×2 pixels become channels of a 1×1.
    `num_classes` None is an unconditional network; with `null_class` the class numbered `num_classes` stands for none.
    """

    network: ClassVar[str] = "lucidrains"

    image_channels: int = 3
    image_size: tuple[int, int] = (32, 32)  # height, width
    dim: int = 64
    init_dim: int = 64
    dim_mults: tuple[int, ...] = (1, 2, 4, 8)
    full_attention: tuple[bool, ...] = (False, False, False, True)
    heads: tuple[int, ...] = (4, 4, 4, 4, 4)
    head_channels: tuple[int, ...] = (32, 32, 32, 32, 32)
    memory: int = 4
    strided: bool = False
    num_classes: int | None = None
    null_class: bool = False
    learned_variance: bool = False
    time_theta: float = 10_000.0  # the longest wave of the time embedding, over 2π

    def __post_init__(self) -> None:
        for name in ("image_size", "dim_mults", "full_attention", "heads", "head_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be (height, width), not {self.image_size}")
        limits = [
            ("image_channels", self.image_channels, 1, 4),
            *(("image_size", side, 1, 4096) for side in self.image_size),
            ("dim", self.dim, 4, 4096),
            ("init_dim", self.init_dim, 1, 4096),
            ("number of dim_mults", len(self.dim_mults), 1, 8),
            *(("dim_mults", mult, 1, 64) for mult in self.dim_mults),
            *(("heads", heads, 1, 4096) for heads in self.heads),
            *(("head_channels", width, 1, 4096) for width in self.head_channels),
            ("memory", self.memory, 0, 4096),
            ("num_classes", 1 if self.num_classes is None else self.num_classes, 1, 100_000),
        ]
        for name, value, low, high in limits:
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value}")
        levels = len(self.dim_mults)
        for name, count in (("full_attention", levels), ("heads", levels + 1), ("head_channels", levels + 1)):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} must have {count} entries for {levels} dim_mults")
        if self.dim % 2:
            raise ValueError(f"dim must be even (sines and cosines), not {self.dim}")
        if not 1 < self.time_theta < 1e9:
            raise ValueError(f"time_theta {self.time_theta} is out of range")
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class needs num_classes")
        if any(side % self.multiple for side in self.image_size):
            raise ValueError(f"image_size must be a multiple of {self.multiple}, not {self.image_size}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.image_channels, *self.image_size)

    @property
    def multiple(self) -> int:
        """Of which height and width must be multiples."""
        return int(2 ** (len(self.dim_mults) - 1))
