"""The DiT backbone: a transformer over patches, conditioned on t, on the gap t - s and on a class.

Scalable Diffusion Models with Transformers (arXiv 2212.09748) with a second time embedding. The
network knows nothing of SoFlow: it maps (x, t, gap, labels) to an array shaped like x.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbone import Backbone, NetworkRequest

# B batch, C channels, H = W side of the data, P patch side, N tokens, D width, h heads


class Size(NamedTuple):
    """Width, number of blocks and attention heads of a DiT."""

    width: int
    depth: int
    heads: int


SIZES = {
    "Nano": Size(128, 4, 4),
    "Ti": Size(192, 12, 3),
    "S": Size(384, 12, 6),
    "B": Size(768, 12, 12),
    "M": Size(1024, 16, 16),
    "L": Size(1024, 24, 16),
    "XL": Size(1152, 28, 16),
}
TIME_FEATURES = 256
MLP_RATIO = 4
NORM_EPS = 1e-6


def parse_model_type(model_type: str) -> tuple[Size, int] | None:
    """Size and patch side named by "DiT-{size}-{patch}", if it names them."""
    match = re.fullmatch(r"DiT-([A-Za-z]+)-([1-9][0-9]{0,5})", model_type)
    return (SIZES[match[1]], int(match[2])) if match and match[1] in SIZES else None


def position_table(tokens_per_side: int, width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions, [1, N, D]: the first D/2 for the column, then the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(tokens_per_side, dtype=torch.float64), frequencies)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D/2]
    columns = axis.repeat(tokens_per_side, 1)
    rows = axis.repeat_interleave(tokens_per_side, dim=0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def time_features(times: Tensor) -> Tensor:
    """[B] times in [0, 1] -> [B, 256] features, cosines first."""
    half = TIME_FEATURES // 2
    exponents = torch.arange(half, device=times.device, dtype=times.dtype) / half
    angles = times[:, None] * torch.exp(-math.log(10000.0) * exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, N, D] scaled by 1 + scale and shifted, both [B, D] (adaLN)."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class PatchEmbedding(nn.Module):
    """[B, C, H, W] -> [B, N, D], tokens in row-major order."""

    def __init__(self, patch: int, data_channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(data_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimeEmbedding(nn.Module):
    """[B] times -> [B, D]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, times: Tensor) -> Tensor:
        return self.mlp(time_features(times))


class LabelEmbedding(nn.Module):
    """[B] labels -> [B, D]; the null label, if there is one, is the last row."""

    def __init__(self, num_classes: int, null_class: bool, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_class, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # [B, N, 3D] -> q, k, v, each [B, h, N, D/h]
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers around a tanh GELU."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each on a modulated norm and behind a gate (adaLN-Zero)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition).chunk(6, dim=1)
        attn_shift, attn_scale, attn_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        attended = self.attn(modulate(self.norm1(x), attn_shift, attn_scale))
        x = torch.addcmul(x, attn_gate[:, None], attended)
        fed = self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))
        return torch.addcmul(x, mlp_gate[:, None], fed)


class FinalLayer(nn.Module):
    """[B, N, D] -> [B, N, P P C]."""

    def __init__(self, width: int, patch: int, data_channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=False)
        self.linear = nn.Linear(width, patch * patch * data_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(Backbone):
    """Maps x [B, C, H, H] at times t, gap [B] and labels [B] to [B, C, H, H]."""

    written = f"DiT-SIZE-PATCH with SIZE one of {', '.join(SIZES)}"
    examples = tuple(f"DiT-{size}-2" for size in SIZES)
    label_table = "y_embedder.embedding_table.weight"

    @classmethod
    def recognises(cls, model_type: str) -> bool:
        return parse_model_type(model_type) is not None

    @classmethod
    def misfit(cls, model_type: str, data_size: int) -> tuple[str, str] | None:
        parsed = parse_model_type(model_type)
        if parsed is None or data_size % parsed[1] == 0:
            return None
        fitting = ", ".join(str(patch) for patch in range(1, 17) if data_size % patch == 0)
        return (
            "model_type",
            f"has a patch that does not divide data_size {data_size}; {fitting} would",
        )

    def __init__(
        self,
        size: Size,
        patch: int,
        data_size: int,
        data_channels: int,
        num_classes: int,
        null_class: bool,
    ):
        super().__init__()
        self.tokens_per_side = data_size // patch
        self.patch = patch
        self.pos_embed = nn.Parameter(
            position_table(self.tokens_per_side, size.width), requires_grad=False
        )
        self.x_embedder = PatchEmbedding(patch, data_channels, size.width)
        self.t_embedder = TimeEmbedding(size.width)
        self.s_embedder = TimeEmbedding(size.width)  # of the gap; the name is the checkpoints'
        self.y_embedder = LabelEmbedding(num_classes, null_class, size.width)
        self.null_label = num_classes if null_class else None
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.depth))
        self.final_layer = FinalLayer(size.width, patch, data_channels)
        self._initialise()

    @classmethod
    def build(cls, request: NetworkRequest) -> Self:
        parsed = parse_model_type(request.model_type)
        assert parsed, "a name that is recognised"
        sizes = (request.data_size, request.data_channels, request.num_classes)
        return cls(*parsed, *sizes, request.null_class)

    def parts_to_compile(self) -> Iterable[nn.Module]:
        return self.blocks

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(patches.out_channels, -1))
        nn.init.zeros_(self.get_parameter("x_embedder.proj.bias"))
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        # Only t: the gap embedding stays Xavier, so that the gap is seen from the first step on.
        nn.init.normal_(self.get_parameter("t_embedder.mlp.0.weight"), std=0.02)
        nn.init.normal_(self.get_parameter("t_embedder.mlp.2.weight"), std=0.02)
        nn.init.zeros_(self.final_layer.linear.weight)
        for name, parameter in self.named_parameters():
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)

    def forward(self, x: Tensor, t: Tensor, gap: Tensor, labels: Tensor | None = None) -> Tensor:
        """F(x, t, t - gap), shaped like x; labels None means the null label for all."""
        if labels is None:
            labels = self._null_labels(x)
        condition = self.t_embedder(t) + self.s_embedder(gap) + self.y_embedder(labels)
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Blocks draw nothing, so there is no random state to keep.
                tokens = checkpoint(
                    block, tokens, condition, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens = block(tokens, condition)
        return self._assemble(self.final_layer(tokens, condition))

    def _null_labels(self, x: Tensor) -> Tensor:
        if self.null_label is None:
            raise ValueError(
                "labels are needed: this network was made with cfg_drop_rate 0, "
                "so its label table has no null class"
            )
        return torch.full((len(x),), self.null_label, device=x.device)

    def _assemble(self, patches: Tensor) -> Tensor:
        """[B, N, P P C] -> [B, C, H, W]."""
        side, patch = self.tokens_per_side, self.patch
        grid = patches.unflatten(2, (patch, patch, -1)).unflatten(1, (side, side))
        # [B, row, column, P, P, C] -> [B, C, row, P, column, P]
        return grid.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
