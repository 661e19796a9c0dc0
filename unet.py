"""The UNet backbone: the unconditional DDPM++ network of EDM, with the gap t - s as second time.

Architecture: Song et al. 2021 (arXiv 2011.13456) as rearranged by Karras et al. 2022 (arXiv
2206.00364, appendix F). Names, shapes and order of the parameters are those of the released
checkpoints.
"""

# B batch, C channels, H height, W width, N pixels of a level (H x W)

import math
from collections.abc import Iterable, Sequence
from typing import Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from backbone import Backbone, NetworkRequest

STEM_WIDTH = 128
WIDTH = 256  # of every level
TIME_FEATURES = 256  # for each of t and the gap
EMBEDDING_WIDTH = 2 * TIME_FEATURES
AUGMENT_LABELS = 6
LEVELS = 3
ATTENTION_LEVEL = 1
ENCODER_BLOCKS = 4  # a level; the decoder has one more, for the level's first stored output

# Gain on the Xavier-uniform bound, by how a layer's name ends; 1 for all others. Branches that
# start near zero make every block start near its skip connection.
INITIAL_GAINS = {"qkv": 0.2**0.5, "conv1": 1e-5, "proj": 1e-5, "aux_conv": 1e-5}

Resampling = Literal["down", "up"]


def _time_features(times: Tensor) -> Tensor:
    """[sin | cos] of times [B] at geometric frequencies from 1 down to 1/10000: [B, 256]."""
    half = TIME_FEATURES // 2
    exponents = torch.arange(half, device=times.device, dtype=times.dtype) / (half - 1)
    angles = times[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _layout(x: Tensor) -> torch.memory_format:
    """The layout of x [B, C, H, W] in memory."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels, eps=1e-6)


def _draw_mask(
    shape: Sequence[int], like: Tensor, probability: float, generator: torch.Generator
) -> Tensor:
    """A dropout mask for an h of this shape, with the type and device of `like`.

    On an accelerator it is True where an element is kept. On a CPU it holds the factors, 0 or
    1 / (1 - probability). Each is the fastest form there.
    """
    if like.device.type != "cpu":
        stays = like.new_empty(shape, dtype=torch.bool)
        return stays.bernoulli_(1 - probability, generator=generator)
    # One 64-bit draw serves four elements: on a CPU, drawing dominates the cost of a mask.
    count = math.prod(shape)
    words = torch.empty(-(-count // 4), dtype=torch.int64)
    bits = words.random_(-(2**63), None, generator=generator).view(torch.int16)
    bound = round(probability * 2**16) - 2**15
    stays = torch.ge(bits[:count].view(shape), bound, out=like.new_empty(shape))
    return stays.div_(1 - probability)


def _dropout(h: Tensor, probability: float, mask: Tensor) -> Tensor:
    """Training-time dropout of `h`, in place on the CPU."""
    if h.device.type == "cpu":
        return h.mul_(mask)
    # One kernel on CUDA: dropout treats values and their gradients alike.
    return torch.ops.aten.native_dropout_backward(h, mask, 1 / (1 - probability))


class _Convolution(nn.Conv2d):
    """A convolution that keeps the size, after resampling by 1/2 or 2 if asked to."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, resample: Resampling | None = None
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.resample = resample
        self.resample_filter: Tensor
        if resample:
            taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
            self.register_buffer("resample_filter", torch.outer(taps, taps)[None, None])

    def forward(self, x: Tensor) -> Tensor:
        if self.resample:
            x = self._resample(x)
        return super().forward(x)

    def _resample(self, x: Tensor) -> Tensor:
        C = x.shape[1]
        weight = self.resample_filter.expand(C, 1, 4, 4)
        if self.resample == "down":
            return F.conv2d(x, weight, stride=2, padding=1, groups=C)
        return F.conv_transpose2d(x, 4 * weight, stride=2, padding=1, groups=C)


class _Block(nn.Module):
    """A residual block conditioned on the embedding, with optional self-attention after it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        dropout: float,
        resample: Resampling | None = None,
        attention: bool = False,
    ):
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.size = size  # of the output, in pixels a side
        self.dropout = dropout
        self.attention = attention
        self.norm0 = _norm(in_channels)
        self.conv0 = _Convolution(in_channels, out_channels, 3, resample)
        self.affine = nn.Linear(EMBEDDING_WIDTH, out_channels)
        self.norm1 = _norm(out_channels)
        self.conv1 = _Convolution(out_channels, out_channels, 3)
        self.skip: nn.Module = nn.Identity()
        if resample or in_channels != out_channels:
            self.skip = _Convolution(in_channels, out_channels, 1, resample)
        if attention:
            self.norm2 = _norm(out_channels)
            self.qkv = _Convolution(out_channels, 3 * out_channels, 1)
            self.proj = _Convolution(out_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor, mask: Tensor | None = None) -> Tensor:
        """mask, as `_draw_mask` makes it, is of the output's shape; None drops nothing."""
        h = self.conv0(F.silu(self.norm0(x)))
        # In place where nothing needs the old values: the cost of these operations is memory.
        h += self.affine(embedding)[:, :, None, None]
        h = F.silu(self.norm1(h))
        if mask is not None:
            h = _dropout(h, self.dropout, mask)
        # The sum of two independent terms of unit variance has variance 2.
        y = self.conv1(h).add_(self.skip(x)).mul_(0.5**0.5)
        if self.attention:
            y = self.proj(self._attend(self.norm2(y))).add_(y).mul_(0.5**0.5)
        return y

    def _attend(self, y: Tensor) -> Tensor:
        """Single-head self-attention over the pixels of y [B, C, H, W], computed in float32."""
        B, C, H, W = y.shape
        qkv = self.qkv(y)
        # Channel 3 c + j holds part j of feature c: [B, C, 3, N] -> three of [B, 1 head, N, C].
        parts = qkv.reshape(B, C, 3, H * W).permute(2, 0, 3, 1).unsqueeze(2)
        parts = parts.to(torch.promote_types(qkv.dtype, torch.float32))
        # Autocast would bring the attention weights down to half precision again, and the fused
        # kernels, which never store the weights, insist on contiguous features.
        with torch.autocast(y.device.type, enabled=False):
            attended = F.scaled_dot_product_attention(*parts.contiguous())
        # Transposed, that is a channels-last view: in the other layout all convolutions after it
        # would take that over, and rearrange their weights for it in every pass.
        attended = attended.to(qkv.dtype).transpose(2, 3).reshape(B, C, H, W)
        return attended.contiguous(memory_format=_layout(qkv))


def _encoder(
    sizes: list[int], data_channels: int, dropout: float
) -> dict[str, _Convolution | _Block]:
    """The encoder's parts by name; the decoder takes the outputs of all."""
    stem = _Convolution(data_channels, STEM_WIDTH, 3)
    entries: dict[str, _Convolution | _Block] = {f"{sizes[0]}x{sizes[0]}_conv": stem}
    width = STEM_WIDTH
    for level, size in enumerate(sizes):
        if level > 0:
            entries[f"{size}x{size}_down"] = _Block(width, WIDTH, size, dropout, resample="down")
        for index in range(ENCODER_BLOCKS):
            attention = level == ATTENTION_LEVEL
            block = _Block(width, WIDTH, size, dropout, attention=attention)
            entries[f"{size}x{size}_block{index}"] = block
            width = WIDTH
    return entries


def _decoder(
    sizes: list[int], stored_widths: list[int], data_channels: int, dropout: float
) -> nn.ModuleDict:
    """The decoder's parts by name; their inputs widen by the encoder's outputs."""
    stored_widths = stored_widths.copy()
    entries: dict[str, nn.Module] = {}
    for level, size in reversed(list(enumerate(sizes))):
        if level == LEVELS - 1:
            entries[f"{size}x{size}_in0"] = _Block(WIDTH, WIDTH, size, dropout, attention=True)
            entries[f"{size}x{size}_in1"] = _Block(WIDTH, WIDTH, size, dropout)
        else:
            entries[f"{size}x{size}_up"] = _Block(WIDTH, WIDTH, size, dropout, resample="up")
        for index in range(ENCODER_BLOCKS + 1):
            attention = level == ATTENTION_LEVEL and index == ENCODER_BLOCKS
            width = WIDTH + stored_widths.pop()
            block = _Block(width, WIDTH, size, dropout, attention=attention)
            entries[f"{size}x{size}_block{index}"] = block
    entries[f"{sizes[0]}x{sizes[0]}_aux_norm"] = _norm(WIDTH)
    entries[f"{sizes[0]}x{sizes[0]}_aux_conv"] = _Convolution(WIDTH, data_channels, 3)
    return nn.ModuleDict(entries)


class UNet(Backbone):
    """F(x, t, s) for pixels, without labels: 55.9 million parameters at any size.

    Its three levels see data_size, data_size / 2 and data_size / 4 pixels a side, and their names
    say so. Attention stands at the middle level (16 pixels where data_size is 32) and once at the
    smallest, whatever the size: its cost grows with the fourth power of data_size.
    """

    written = "UNet"
    examples = ("UNet",)
    is_conditional = False
    uses_dropout_seed = True

    @classmethod
    def misfit(cls, model_type: str, data_size: int) -> tuple[str, str] | None:
        factor = 2 ** (LEVELS - 1)
        if data_size % factor == 0:
            return None
        return "data_size", f"must be a multiple of {factor} for the UNet, which halves it twice"

    @classmethod
    def build(cls, request: NetworkRequest) -> Self:
        return cls(request.data_size, request.data_channels, request.dropout)

    def __init__(self, data_size: int = 32, data_channels: int = 3, dropout: float = 0.30):
        super().__init__()
        sizes = [data_size // 2**level for level in range(LEVELS)]
        self.map_augment = nn.Linear(AUGMENT_LABELS, EMBEDDING_WIDTH, bias=False)
        self.map_layer0 = nn.Linear(EMBEDDING_WIDTH, EMBEDDING_WIDTH)
        self.map_layer1 = nn.Linear(EMBEDDING_WIDTH, EMBEDDING_WIDTH)
        encoder = _encoder(sizes, data_channels, dropout)
        self.enc = nn.ModuleDict(encoder)
        stored_widths = [part.out_channels for part in encoder.values()]
        self.dec = _decoder(sizes, stored_widths, data_channels, dropout)
        self._draw_weights()
        self._kept_masks: dict[tuple, list[Tensor | None]] = {}  # of one pass at most

    def blocks(self) -> list[_Block]:
        """All blocks, in the order of the forward pass."""
        return [part for part in self.modules() if isinstance(part, _Block)]

    def parts_to_compile(self) -> Iterable[nn.Module]:
        return self.blocks()

    def _draw_weights(self) -> None:
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                gains = [gain for end, gain in INITIAL_GAINS.items() if name.endswith(end)]
                nn.init.xavier_uniform_(layer.weight, *gains)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        gap: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        dropout_seed: Tensor | None = None,
    ) -> Tensor:
        """F(x, t, t - gap), shaped like x [B, C, H, W].

        t and gap are [B], in [0, 1]. augment_labels [B, 6]; None means not augmented. In training
        mode equal `dropout_seed`s, an int64 on the CPU, give equal dropout masks and leave every
        other random state as it was; None draws a seed from torch's global state. In evaluation
        mode nothing is dropped.
        """
        if labels is not None:
            raise ValueError("the UNet is unconditional: it takes no labels")
        embedding = self._embed(t, gap, augment_labels)
        stem, *blocks = self.enc.values()
        stored = [stem(x)]
        masks = iter(self._masks(x, _layout(stored[0]), dropout_seed))
        for block in blocks:
            stored.append(self._pass(block, stored[-1], embedding, next(masks)))
        h = stored[-1]
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            if h.shape[1] < block.in_channels:
                h = torch.cat([h, stored.pop()], dim=1)
            h = self._pass(block, h, embedding, next(masks))
        return conv(F.silu(norm(h)))

    def _masks(
        self, x: Tensor, layout: torch.memory_format, seed: Tensor | None
    ) -> list[Tensor | None]:
        """The dropout mask of each block for an input x; no random state but the seed is used.

        A pass without gradient that follows one with the same seed takes that one's masks, which
        the backward pass keeps anyway: to draw them is what dropout costs.
        """
        blocks = self.blocks()
        if not self.training:
            return [None] * len(blocks)
        drawn = int(torch.randint(2**62, ()) if seed is None else seed)
        key = (drawn, layout, x.shape, x.dtype, x.device)
        kept, self._kept_masks = self._kept_masks, {}
        if key in kept:
            return kept[key]
        generator = torch.Generator(x.device).manual_seed(drawn)
        masks: list[Tensor | None] = []
        for block in blocks:
            mask = None
            if block.dropout > 0:
                shape = (len(x), block.out_channels, block.size, block.size)
                mask = _draw_mask(shape, x, block.dropout, generator)
                mask = mask.contiguous(memory_format=layout)
            masks.append(mask)
        if torch.is_grad_enabled():
            self._kept_masks = {key: masks}
        return masks

    def _pass(self, block: nn.Module, x: Tensor, embedding: Tensor, mask: Tensor | None) -> Tensor:
        """The block's output; activation checkpointing keeps only its input and mask."""
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, embedding, mask)
        # A block draws nothing, so there is no random state to keep.
        return checkpoint(block, x, embedding, mask, use_reentrant=False, preserve_rng_state=False)

    def _embed(self, t: Tensor, gap: Tensor, augment_labels: Tensor | None) -> Tensor:
        """The blocks' conditioning on times and augmentation: [B, 512]."""
        if augment_labels is None:
            # Adds zero, but gives every parameter a gradient, as DDP requires.
            augment_labels = t.new_zeros(t.shape[0], AUGMENT_LABELS)  # len() is fixed in a graph
        embedding = torch.cat([_time_features(t), _time_features(gap)], dim=1)
        embedding = embedding + self.map_augment(augment_labels)
        embedding = F.silu(self.map_layer0(embedding))
        return F.silu(self.map_layer1(embedding))
