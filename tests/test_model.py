"""MobileSAM's numbers, its weights' names, and LoRA's promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_mobile_sam import mobile_sam_state
from timm.models.tiny_vit import TinyVitBlock

from nsam.runtime.card import OutputSpec
from nsam.runtime.errors import ModelError
from nsam.train.checkpoint import build_model
from nsam.train.encoder import Block, LayerNorm2d
from nsam.train.lora import LowRank, add_lora, has_lora, merge_lora
from nsam.train.losses import map_losses, soft_dice
from nsam.train.mobile_sam import rename_mobile_sam
from nsam.train.model import UNUSED, NucleusNet, parameter_table
from nsam.train.optim import Ema
from nsam.train.settings import NSAM, SEED
from nsam.train.targets import inner_distance, make_targets

IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8))


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "mobile_sam.pt"
    torch.save(mobile_sam_state(), path)
    return path


def test_the_numbers_in_the_readme(official: Path) -> None:
    """118,784 of LoRA; 4,177,124 trainable of MobileSAM's 10,248,876; 3,840 and 144,832 in what it does not have."""
    table = {part: row for part, *row in parameter_table(build_model(replace(SEED, base=str(official)))[0])}
    assert table["LoRA"] == [118_784, 118_784]
    assert table["tokens"] == [3_840, 3_840]
    assert table["in all"] == [10_248_876 + 3_840, 4_177_124 + 3_840]
    assert table["prompt encoder"] == [6_220, 0]
    assert table["classifier head (unused)"] == [321_640, 0]
    table = {part: row for part, *row in parameter_table(build_model(replace(NSAM, base=str(official)))[0])}
    assert table["detail"] == [144_832, 144_832]
    assert table["in all"] == [10_397_548, 4_325_796]


def test_names_of_the_official_file() -> None:
    for official_name, own in {
        "image_encoder.patch_embed.seq.0.c.weight": "encoder.vit.patch_embed.conv1.conv.weight",
        "image_encoder.layers.0.blocks.0.conv1.bn.bias": "encoder.vit.stages.0.blocks.0.conv1.bn.bias",
        "image_encoder.layers.0.downsample.conv2.c.weight": "encoder.vit.stages.1.downsample.conv2.conv.weight",
        "image_encoder.layers.3.blocks.1.local_conv.c.weight": "encoder.vit.stages.3.blocks.1.local_conv.conv.weight",
        "image_encoder.norm_head.weight": "encoder.vit.head.norm.weight",
        "image_encoder.neck.0.weight": "encoder.neck.0.weight",
        "mask_decoder.iou_token.weight": "mask_decoder.iou_token.weight",
    }.items():
        assert rename_mobile_sam(official_name) == own


def test_every_weight_of_the_official_file_is_loaded(official: Path) -> None:
    model, _ = build_model(replace(NSAM, base=str(official), tune="full"))
    own, state = model.state_dict(), torch.load(official, weights_only=True)
    for name, value in state.items():
        if not name.endswith("attention_bias_idxs"):
            assert torch.equal(own[rename_mobile_sam(name)], value), name


def test_another_architecture_and_pickles_are_refused(tmp_path: Path) -> None:
    state = mobile_sam_state()
    spoilt = {
        "missing": {n: v for n, v in state.items() if n != "mask_decoder.iou_token.weight"},
        "unknown": {**state, "image_encoder.blocks.0.attn.qkv.weight": torch.zeros(3)},
        "another shape": {**state, "mask_decoder.iou_token.weight": torch.zeros(1, 8)},
    }
    for message, broken in spoilt.items():
        torch.save(broken, tmp_path / "w.pt")
        with pytest.raises(ModelError, match=message):
            build_model(replace(NSAM, base=str(tmp_path / "w.pt")))
    torch.save({"model": Path("x")}, tmp_path / "w.pt")
    with pytest.raises(ModelError, match="without pickle"):
        build_model(replace(NSAM, base=str(tmp_path / "w.pt")))


@pytest.mark.parametrize(("channels", "stride"), [(("nucleus",), 4), (("nucleus", "distance"), 2)])
def test_maps_have_the_promised_shape_whatever_the_batch(channels: tuple[str, ...], stride: int) -> None:
    torch.manual_seed(0)
    model = NucleusNet(OutputSpec(channels, channels, stride)).eval()
    with torch.inference_mode():
        maps = model(IMAGES)
        assert maps.shape == (2, len(channels), 64 // stride, 96 // stride)
        # An image's maps do not depend on its neighbours in the batch.
        torch.testing.assert_close(model(IMAGES[1:]), maps[1:], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="multiples of 16"):
        model(IMAGES[:, :50])


def test_no_map_depends_on_what_is_called_unused() -> None:
    torch.manual_seed(0)
    model = NucleusNet().eval()
    with torch.inference_mode():
        before = model(IMAGES)
        for start in UNUSED:
            weights = [value for name, value in model.state_dict().items() if name.startswith(start)]
            assert weights, start
            for value in weights:
                value.fill_(3)
        assert torch.equal(model(IMAGES), before)
    maps = model.train()(IMAGES).square().sum()
    maps.backward()
    others = [n for n, p in model.named_parameters() if p.grad is None and not n.startswith(UNUSED)]
    # Two of the four mask tokens have no channel, but the others attend to them.
    assert others == [n for n in others if n.startswith(("mask_decoder.output_hypernetworks_mlps", "mask_decoder.iou"))]


def test_the_far_end_of_a_tile_changes_nothing_here() -> None:
    """Windows of 224 px and small convolutions hand on what they see; the decoder's tokens see nothing."""
    torch.manual_seed(0)
    model = NucleusNet().eval()
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (1, 32, 10 * 224, 3), np.uint8))
    changed = images.clone()
    changed[:, :, -32:] = 255 - changed[:, :, -32:]
    with torch.inference_mode():
        difference = (model(images) - model(changed)).abs()
    assert difference[..., -16:].max() > 1e-2
    assert difference[..., :112].max() == 0


@pytest.mark.parametrize("sides", [(14, 14), (21, 28), (5, 35)])
def test_windows_equal_timm_s_where_sides_are_no_multiple_and_where_they_are(sides: tuple[int, int]) -> None:
    torch.manual_seed(0)
    block = Block(dim=20, num_heads=2, window_size=14).eval()
    x = torch.randn(2, *sides, 20)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), TinyVitBlock.forward(block, x))


def test_layer_norm_equals_sam_s_and_survives_fp16() -> None:
    from segment_anything.modeling.common import LayerNorm2d as Reference

    x = torch.randn(2, 8, 5, 7) * 3
    torch.testing.assert_close(LayerNorm2d(8)(x), Reference(8)(x))
    # Differences beyond 256 pass 65,504 when squared in fp16.
    large = torch.randn(1, 8, 4, 4) * 2000
    assert not Reference(8).half()(large.half()).float().allclose(Reference(8)(large), atol=0.02)
    torch.testing.assert_close(LayerNorm2d(8).half()(large.half()).float(), Reference(8)(large), rtol=0.02, atol=0.02)


def test_new_lora_changes_nothing_and_merging_keeps_what_it_learnt() -> None:
    torch.manual_seed(0)
    model = NucleusNet().eval()
    with torch.inference_mode():
        plain = model(IMAGES)
    assert len(add_lora(model.encoder.vit.stages, rank=4, alpha=8)) == 40
    with torch.inference_mode():
        assert torch.equal(model(IMAGES), plain)
        for module in model.modules():
            if isinstance(module, LowRank):
                module.b.normal_(0, 0.05)
        adapted = model(IMAGES)
    assert (adapted - plain).abs().max() > 1e-2
    names_before = {n for n, _ in NucleusNet().named_parameters()}
    assert merge_lora(model) == 40
    assert not has_lora(model)
    assert {n for n, _ in model.named_parameters()} == names_before
    with torch.inference_mode():
        torch.testing.assert_close(model(IMAGES), adapted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no LoRA"):
        merge_lora(model)
    add_lora(model, rank=1)
    with pytest.raises(ValueError, match="LoRA already"):
        add_lora(model, rank=1)


def test_an_average_is_applied_and_taken_back() -> None:
    """Also the attention biases that TinyViT looks up once in eval mode: they must not go stale."""
    torch.manual_seed(0)
    model = NucleusNet()
    ema = Ema(model, 0.5)
    model.eval()
    with torch.inference_mode():
        before = model(IMAGES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.train().eval()
    with torch.inference_mode():
        model(IMAGES)  # looks up the new ones
    with ema.applied(model), torch.inference_mode():
        assert torch.equal(model(IMAGES), before)
    model.eval()
    with torch.inference_mode():
        assert not torch.equal(model(IMAGES), before)


LABELS = np.zeros((12, 16), np.int32)
LABELS[1:6, 1:6] = 7
LABELS[1:6, 6:11] = 300
LABELS[8:11, 3:6] = 5


def test_inner_distance_is_one_in_the_middle_and_falls_to_touching_borders() -> None:
    distance = inner_distance(LABELS)
    np.testing.assert_allclose(distance[3, 1:11], np.array([1, 2, 3, 2, 1, 1, 2, 3, 2, 1]) / 3)
    np.testing.assert_allclose(distance[9, 3:6], [0.5, 1, 0.5])
    assert (distance[LABELS == 0] == 0).all()


def test_a_nucleus_in_the_bend_of_another_is_a_border_to_it() -> None:
    """Their boxes overlap."""
    labels = np.ones((9, 9), np.int32)
    labels[3:, 3:] = 2
    distance = inner_distance(labels)
    np.testing.assert_allclose(distance[6, :3], [0.5, 1, 0.5])
    np.testing.assert_allclose(distance[5:7, 5:7], [[1, 1], [1, 1]])
    assert distance[2, 3:8].max() <= 0.5


def test_targets_average_over_the_stride() -> None:
    nucleus, distance = make_targets(LABELS, ("nucleus", "distance"), 2)
    assert nucleus.shape == distance.shape == (6, 8)
    assert nucleus[0, 0] == 0.25
    assert nucleus[1, 1] == 1
    assert distance[1, 1] == pytest.approx((2 / 3 + 1 + 2 / 3 + 2 / 3) / 4)


def test_perfect_maps_cost_nothing_and_worse_ones_more() -> None:
    targets = torch.from_numpy(make_targets(LABELS, ("nucleus", "distance"), 1))[None]
    perfect = torch.stack([(targets[:, 0] - 0.5) * 60, targets[:, 1]], dim=1)
    channels = ("nucleus", "distance")
    terms = map_losses(perfect, targets, channels, dice=True)
    assert all(float(term) < 1e-3 for term in terms.values())
    worse = map_losses(perfect * 0, targets, channels, dice=True)
    assert all(worse[name] > 0.05 for name in terms)
    assert "dice" not in map_losses(perfect, targets, channels, dice=False)
    # Far from any nucleus the distance is free.
    far = perfect.clone()
    far[0, 1, :, 15] = 9
    assert map_losses(far, targets, channels, dice=True)["distance"] < 1e-3
    assert float(soft_dice(torch.zeros(1, 4, 4), torch.zeros(1, 4, 4))) == 0
