"""MobileSAM without prompts: its mask tokens are read as dense maps.

Decoder: segment-anything's MaskDecoder behind the encoder of encoder.py. Cost does not depend on the number of nuclei,
and the graph has one input and one output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from segment_anything.modeling import MaskDecoder, PromptEncoder, TwoWayTransformer
from torch import Tensor, nn

from nsam.runtime.card import SAM_MEAN, SAM_STD, OutputSpec
from nsam.train.encoder import EMBED_DIM, ENCODER_STRIDE, Early, Encoder, LayerNorm2d

#: Weights of MobileSAM on which no map depends, by the start of their names.
UNUSED = (
    "encoder.vit.head.",
    "prompt_encoder.pe_layer.",
    "prompt_encoder.point_embeddings.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.mask_downscaling.",
    "mask_decoder.iou_prediction_head.",
    "mask_decoder.transformer.layers.0.cross_attn_token_to_image.",
    "mask_decoder.transformer.layers.1.cross_attn_token_to_image.",
    "mask_decoder.transformer.final_attn_token_to_image.",
)


def needed(names: Iterable[str]) -> list[str]:
    """Those of the state's names without whose values the maps would be others."""
    return [name for name in names if not name.startswith(UNUSED) and not name.endswith("num_batches_tracked")]


class Detail(nn.Module):
    """The decoder's upscaling with the encoder's early features, and one more x2 stage: maps at stride 2.

    SAM 2 (Ravi et al. 2024) feeds its decoder so at strides 8 and 4. At stride 4 the best possible AJI on NuInsSeg
    falls from .98 to .95, and small nuclei suffer most; what parts two that touch is a line of one or two pixels,
    which no feature of stride 16 holds.
    """

    def __init__(self, width: int = EMBED_DIM // 8) -> None:
        super().__init__()
        self.skip_8 = zeroed(nn.Conv2d(128, 2 * width, 1))
        self.mix_8 = Mix(2 * width, 2 * width)
        self.skip = nn.Conv2d(64, width, 1)
        self.mix_4 = Mix(width, 2 * width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.skip_2 = zeroed(nn.Conv2d(32, width, 1))
        self.mix_2 = Mix(width, width)

    def forward(self, x: Tensor, early: Early, upscaling: nn.Sequential) -> Tensor:
        """(N, 256, H/16, W/16) -> (N, 32, H/2, W/2); `upscaling` is the mask decoder's own, to stride 4."""
        stride_2, stride_4, stride_8 = early
        first, norm, act, second, last = upscaling
        x = self.mix_8(act(norm(first(x)) + self.skip_8(stride_8)))
        x = self.mix_4(last(second(x)) + self.skip(stride_4))
        return self.mix_2(F.gelu(self.up(x) + self.skip_2(stride_2)))


class Mix(nn.Module):
    """Two convolutions beside the identity, where they start."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inside = nn.Conv2d(width, inner, 3, padding=1)
        self.out = zeroed(nn.Conv2d(inner, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(F.gelu(self.inside(x)))


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """A branch that adds nothing until it has learned."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class Tokens(nn.Module):
    """SAM's two-way transformer with tokens that do not look at the image: they see a learned constant in its place.

    The image still attends to the tokens, but nothing passes from one end of a tile to the other this way, so maps
    do not depend on where a tile is cut, and the tokens' whole side becomes constants when exported. (With no prompt
    to find in the image, trained tokens had come to be the same for every tile by themselves: in both layers they
    varied by .6 % of their norm. The positional encoding changed no map.)
    """

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        looks = len(decoder.transformer.layers) + 1
        self.seen = nn.Parameter(torch.zeros(looks, 1 + decoder.num_mask_tokens, EMBED_DIM))

    def forward(self, decoder: MaskDecoder, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, HW, 256) -> the same shape, and the tokens (1, 5, 256)."""
        start = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight]).unsqueeze(0)
        tokens = start
        for layer, seen in zip(decoder.transformer.layers, self.seen[:-1], strict=True):
            if layer.skip_first_layer_pe:
                tokens = layer.self_attn(tokens, tokens, tokens)
            else:
                tokens = tokens + layer.self_attn(tokens + start, tokens + start, tokens)
            tokens = layer.norm2(layer.norm1(tokens) + seen)
            tokens = layer.norm3(tokens + layer.mlp(tokens))
            many = tokens.expand(image.shape[0], -1, -1)
            image = layer.norm4(image + layer.cross_attn_image_to_token(image, many + start, many))
        return image, decoder.transformer.norm_final_attn(tokens + self.seen[-1])


class NucleusNet(nn.Module):
    """uint8 (N, H, W, 3) RGB -> float32 maps (N, C, H/stride, W/stride); H and W are multiples of 16.

    Args:
        output: channels (at most four: one mask token each) and stride: 2 with the detail stage, 4 without.
        mean, std: normalisation of RGB in 0..255.
    """

    def __init__(
        self,
        output: OutputSpec | None = None,
        mean: Sequence[float] = SAM_MEAN,
        std: Sequence[float] = SAM_STD,
    ) -> None:
        super().__init__()
        self.output = output or OutputSpec()
        if self.output.stride not in (2, 4):
            raise ValueError(f"`output.stride` must be 2 or 4, is {self.output.stride}")
        self.encoder = Encoder()
        # Of it only the embedding that stands for `no mask` is used; sizes serve prompts and the positional encoding.
        self.prompt_encoder = PromptEncoder(
            embed_dim=EMBED_DIM, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_chans=16
        )
        self.mask_decoder = MaskDecoder(
            transformer_dim=EMBED_DIM,
            transformer=TwoWayTransformer(depth=2, embedding_dim=EMBED_DIM, num_heads=8, mlp_dim=2048),
        )
        norm = self.mask_decoder.output_upscaling[1]
        self.mask_decoder.output_upscaling[1] = LayerNorm2d(norm.weight.numel(), norm.eps)
        if not 1 <= len(self.output.channels) <= self.mask_decoder.num_mask_tokens:
            raise ValueError(f"`output.channels` must name 1 to 4 channels, names {self.output.channels}")
        self.tokens = Tokens(self.mask_decoder)
        self.detail = Detail() if self.output.stride == 2 else None
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class.

        Raises:
            ValueError: a side that is no multiple of 16.
        """
        if images.shape[1] % ENCODER_STRIDE or images.shape[2] % ENCODER_STRIDE:
            raise ValueError(
                f"`images` must have sides that are multiples of {ENCODER_STRIDE}, has {tuple(images.shape[1:3])}"
            )
        x = (images.float().permute(0, 3, 1, 2) - self.mean) / self.std
        embedding, early = self.encoder(x)
        return self._decode(embedding, early).float()

    def _decode(self, embedding: Tensor, early: Early) -> Tensor:
        # MaskDecoder.predict_masks repeats the embedding for each prompt (batch x batch): run its parts instead.
        decoder = self.mask_decoder
        n, _, h, w = embedding.shape
        source = embedding + self.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        source, tokens = self.tokens(decoder, source.flatten(2).transpose(1, 2))
        source = source.transpose(1, 2).reshape(n, EMBED_DIM, h, w)
        if self.detail is None:
            features = decoder.output_upscaling(source)
        else:
            features = self.detail(source, early, decoder.output_upscaling)
        heads = decoder.output_hypernetworks_mlps[: len(self.output.channels)]
        # Token 0 is the IoU token, whose head is not used.
        weights = torch.stack([head(tokens[:, 1 + i]) for i, head in enumerate(heads)], dim=1)
        return F.conv2d(features, weights[0, :, :, None, None])


def parameter_table(model: NucleusNet) -> list[tuple[str, int, int]]:
    """(part, parameters, trainable parameters) for each part of the network and in all."""
    parts: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if ".parametrizations." in name and not name.endswith(".original"):
            part = "LoRA"
        elif name.startswith("encoder.vit.head"):
            part = "classifier head (unused)"
        else:
            part = name.split(".")[0].replace("_", " ")
        row = parts.setdefault(part, [0, 0])
        row[0] += parameter.numel()
        row[1] += parameter.numel() if parameter.requires_grad else 0
    table = [(part, count, trainable) for part, (count, trainable) in parts.items()]
    return [*table, ("in all", sum(r[1] for r in table), sum(r[2] for r in table))]
