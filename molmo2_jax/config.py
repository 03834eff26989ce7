"""Configuration of a Molmo2 model: sizes of its towers, and how pixels become visual tokens.

All configs are frozen and checked at construction. They are here rather than next to the modules because
the model, the inputs and the Hugging Face conversion all read them.

Source: paper, section 3.1 and appendix; reference: olmo/model_configs.py, olmo/nn/llm.py,
olmo/nn/image_vit.py.
"""

import dataclasses
from typing import Literal

# Appended in this order directly after the base vocabulary; they index the second embedding table.
SPECIAL_TOKENS = (
    "<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>",
    "<frame_start>", "<frame_end>", "<|video|>", "<|points|>", "<|token_index|>", "<|vit_index|>",
    "<|vit_loc|>",
)

GROUNDING_TOKENS = ("<|token_index|>", "<|vit_index|>", "<|vit_loc|>")   # of a point, in order: PointerConfig

VisualAttention = Literal["image_tokens", "within_image", "causal"]
VisualMerge = Literal["add", "replace"]


def require(ok: bool, rule: str, value) -> None:
    """Checks a value of a configuration.

    Raises:
      ValueError: `ok` is false; the message is the rule and the value that breaks it.
    """
    if not ok:
        raise ValueError(f"{rule}; got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The ViT: one crop of image_size x image_size pixels in, one vector per patch out."""
    image_size: int = 378    # pixels per side of a crop
    patch_size: int = 14     # pixels per side of a patch
    width: int = 1152
    num_layers: int = 25     # layers that are kept; SigLIP2 has 27, the last two are unused
    num_heads: int = 16
    head_dim: int = 72
    mlp_width: int = 4304
    norm_eps: float = 1e-6
    init_std: float | None = None           # None: scaled by fan-in
    position_init_std: float | None = None  # None: width ** -0.5, as in the reference

    def __post_init__(self):
        require(self.image_size % self.patch_size == 0,
                "image_size must be a multiple of patch_size", (self.image_size, self.patch_size))
        require(min(self.width, self.num_layers, self.num_heads, self.head_dim, self.mlp_width) >= 1,
                "sizes of the ViT must be >= 1", self)

    @property
    def grid(self) -> int:
        """Patches per side of a crop."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid ** 2

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: rows x columns x RGB."""
        return self.patch_size ** 2 * 3

    @property
    def patch_shape(self) -> tuple[int, int]:
        """(P, C): patches of a crop, numbers in a patch."""
        return self.num_patches, self.patch_values


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConnectorConfig:
    """Attention pooling of ViT patches into visual tokens, then a SwiGLU projector (paper, section 3.1)."""
    taps: tuple[int, ...] = (24, 18)         # zero-based ViT layers whose outputs are concatenated, in order
    num_heads: int = 16
    head_dim: int = 72
    mlp_width: int = 12288
    image_window: tuple[int, int] = (2, 2)   # patches pooled into one visual token, rows x columns
    video_window: tuple[int, int] = (3, 3)
    init_std: float | None = 0.02            # None: scaled by fan-in
    has_output: bool = True                  # a linear layer before the projector; MolmoPoint has none

    def __post_init__(self):
        require(len(self.taps) >= 1 and min(self.taps) >= 0, "taps must name layers >= 0", self.taps)
        for window in (self.image_window, self.video_window):
            require(len(window) == 2 and min(window) >= 1,
                    "a pooling window must be at least (1, 1) patches", window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN rotary scaling, used by some layers of OLMo 3 (reference: olmo/nn/rope.py)."""
    factor: float = 8.0
    original_length: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.2079441541679836  # 1 + 0.1 ln(factor)
    layers: tuple[int, ...] = (3, 7, 11, 15, 19, 23, 27, 31)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The decoder: Qwen3 style by default, OLMo 3 style with qk_norm="olmo" and norm_after=True."""
    vocab_size: int = 151936           # rows of the base table = width of the logits
    additional_vocab_size: int = 128   # rows of the second, input-only table
    width: int = 4096
    num_layers: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    mlp_width: int = 12288
    rope_theta: float = 1e6
    yarn: YarnConfig | None = None
    qk_norm: Literal["qwen3", "olmo"] = "qwen3"
    norm_after: bool = False
    norm_eps: float = 1e-6
    tied_head: bool = False
    max_positions: int = 36864         # longest sequence the exported config advertises
    init_std: float | None = 0.02      # None: scaled by fan-in
    embedding_init_std: float = 0.02

    def __post_init__(self):
        require(self.num_heads % self.num_kv_heads == 0, "num_heads must be a multiple of num_kv_heads",
                (self.num_heads, self.num_kv_heads))
        require(self.head_dim % 2 == 0, "head_dim must be even for rotary positions", self.head_dim)
        require(self.additional_vocab_size >= len(SPECIAL_TOKENS),
                f"additional_vocab_size must hold the {len(SPECIAL_TOKENS)} special tokens",
                self.additional_vocab_size)
        require(self.qk_norm in ("qwen3", "olmo"), "qk_norm must be 'qwen3' or 'olmo'", self.qk_norm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointerConfig:
    """Pointing by choosing visual tokens, as MolmoPoint does (arXiv 2603.28069; model/pointer.py).

    score_scale: divisor of the scores of visual tokens; None: sqrt(width). The reference divides by
      sqrt(R + 1), R being the padded number of visual tokens of a row, so that the loss depends on padding;
      to continue from released weights, set the value of their last stage: sqrt(31105) = 176.4.
    loss_weight: weight of a choice in the loss: "token": that of its token; "one": 1, as the public training
      code computes it.
    raw_location_reference: read locations from the state before its norm, as the published inference code
      does; its training code, and the default here, read them after the norm.
    """
    width: int = 512
    theta: float = 50000.0
    score_scale: float | None = None
    loss_weight: Literal["token", "one"] = "token"
    raw_location_reference: bool = False
    init_std: float = 0.02

    def __post_init__(self):
        require(self.width >= 2 and self.width % 2 == 0, "width must be even, for rotary positions",
                self.width)
        require(self.score_scale is None or self.score_scale > 0, "score_scale must be > 0",
                self.score_scale)
        require(self.loss_weight in ("token", "one"), "loss_weight must be 'token' or 'one'",
                self.loss_weight)

    @property
    def scale(self) -> float:
        return self.width ** 0.5 if self.score_scale is None else self.score_scale


@dataclasses.dataclass(frozen=True, kw_only=True)
class Molmo2Config:
    """The whole model.

    visual_attention: which visual tokens see each other in both directions.
    visual_merge: "add" adds visual features to the embedding of `<im_patch>`, as the reference and
      transformers do; "replace" overwrites it, as vLLM does. "replace" is for comparisons, not for training.
    freeze_patch_row: the embedding of `<im_patch>` is initialised with zeros and gets no gradient; adding
      and replacing are then equivalent. For models trained from scratch.
    pointer: points by choosing visual tokens; None: points as text. With it, the head also predicts the
      added tokens, and the overview of an image is written with `<im_low>`, embedded as `<im_patch>`.
    """
    vision: VisionConfig
    connector: ConnectorConfig
    text: TextConfig
    visual_attention: VisualAttention = "image_tokens"
    visual_merge: VisualMerge = "add"
    freeze_patch_row: bool = False
    pointer: PointerConfig | None = None

    def __post_init__(self):
        require(max(self.connector.taps) < self.vision.num_layers,
                f"taps must name one of the {self.vision.num_layers} ViT layers", self.connector.taps)
        require(self.visual_attention in ("image_tokens", "within_image", "causal"),
                "visual_attention must be 'image_tokens', 'within_image' or 'causal'",
                self.visual_attention)
        require(self.visual_merge in ("add", "replace"), "visual_merge must be 'add' or 'replace'",
                self.visual_merge)

    def special_id(self, token: str) -> int:
        """Vocabulary id of one of SPECIAL_TOKENS."""
        return self.text.vocab_size + SPECIAL_TOKENS.index(token)

    @property
    def overview_token(self) -> str:
        """The token of the visual tokens of an image's overview."""
        return "<im_patch>" if self.pointer is None else "<im_low>"

    @property
    def num_logits(self) -> int:
        """Width of the logits: tokens that can be generated."""
        return self.text.vocab_size + (0 if self.pointer is None else self.text.additional_vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How media become crops and tokens; also written into the exported processor files."""
    max_crops: int = 8                        # tiles per image, without the overview
    high_res_crops: int = 24                  # tiles in the high-resolution draw
    overlap_margins: tuple[int, int] = (4, 4)  # patches on the left/top and right/bottom of a tile
    max_images: int = 5
    max_frames: int = 128
    max_fps: float = 2.0
    max_tracking_fps: int = 10             # for examples with tracking_fps; 2 in the paper, 10 in its code
    frame_time_text: bool = True              # the seconds before each frame, as text
    per_frame_special_tokens: bool = True     # one pair of markers per frame, not per video
    use_frame_special_tokens: bool = True     # <frame_start>, <frame_end>; or <im_start>, <im_end>
    max_read_seconds: float = 600.0           # limit on reading the media of one example

    def __post_init__(self):
        require(self.max_crops >= 1 and self.high_res_crops >= 1, "crop limits must be >= 1",
                (self.max_crops, self.high_res_crops))
        require(self.max_frames >= 1, "max_frames must be >= 1", self.max_frames)
        require(self.max_fps > 0, "max_fps must be > 0 frames per second", self.max_fps)
        require(self.max_tracking_fps >= 1, "max_tracking_fps must be >= 1 frame per second",
                self.max_tracking_fps)
        require(self.max_read_seconds > 0, "max_read_seconds must be > 0", self.max_read_seconds)
        require(min(self.overlap_margins) >= 0, "overlap_margins must be >= 0 patches",
                self.overlap_margins)


def molmo2_8b() -> Molmo2Config:
    """Molmo2-8B: Qwen3-8B decoder, SigLIP2 so400m/14-384 ViT."""
    return Molmo2Config(vision=VisionConfig(), connector=ConnectorConfig(), text=TextConfig())


def molmo2_4b() -> Molmo2Config:
    """Molmo2-4B: Qwen3-4B-Instruct-2507 decoder. The paper gives theta 1e6; the base model has 5e6."""
    return Molmo2Config(
        vision=VisionConfig(), connector=ConnectorConfig(mlp_width=9728),
        text=TextConfig(width=2560, mlp_width=9728, rope_theta=5e6, tied_head=True))


def molmo2_o_7b() -> Molmo2Config:
    """Molmo2-O-7B: OLMo 3 decoder. The paper gives a vocabulary of 100352; the code has 100278."""
    return Molmo2Config(
        vision=VisionConfig(), connector=ConnectorConfig(mlp_width=11008),
        text=TextConfig(vocab_size=100278, num_layers=32, num_kv_heads=32, mlp_width=11008, rope_theta=5e5,
                        yarn=YarnConfig(), qk_norm="olmo", norm_after=True, max_positions=65536))


def molmo_point_8b() -> Molmo2Config:
    """MolmoPoint-8B and MolmoPoint-GUI-8B: Qwen3-8B decoder."""
    return dataclasses.replace(
        molmo2_8b(), connector=ConnectorConfig(has_output=False), text=TextConfig(max_positions=37376),
        pointer=PointerConfig())


def molmo_point_vid_4b() -> Molmo2Config:
    """MolmoPoint-Vid-4B: Qwen3-4B-Instruct-2507 decoder."""
    base = molmo2_4b()
    return dataclasses.replace(
        base, connector=dataclasses.replace(base.connector, has_output=False),
        text=dataclasses.replace(base.text, max_positions=37376), pointer=PointerConfig())


def nano() -> Molmo2Config:
    """The same architecture at laptop size, for the quickstart, tests and demos."""
    return Molmo2Config(
        freeze_patch_row=True,
        vision=VisionConfig(image_size=72, patch_size=8, width=64, num_layers=3, num_heads=4, head_dim=16,
                            mlp_width=256, position_init_std=0.5),
        connector=ConnectorConfig(taps=(2, 0), num_heads=4, head_dim=16, mlp_width=256, init_std=None),
        text=TextConfig(vocab_size=512, width=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=32,
                        mlp_width=256, max_positions=4096, init_std=None, embedding_init_std=0.3))
