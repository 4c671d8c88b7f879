"""One peer on one region, in its own environment: prints its seconds as JSON. Started by peers.py."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import tifffile
from peak_memory import peak_mb

WARM_UP, ROUNDS = 1, 3


def best(run: Callable[[], Any]) -> tuple[float, Any]:
    """(least seconds of three, the result); one run before does not count."""
    seconds = []
    for _ in range(WARM_UP + ROUNDS):
        begin = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[WARM_UP:]), result


def nsam(image: np.ndarray, labels: np.ndarray, mpp: float, threads: int) -> dict[str, Any]:
    """The runtime, from pixels to measured nuclei."""
    from pathlib import Path

    from nsam.runtime.engines import load
    from nsam.runtime.frame import Frame
    from nsam.runtime.pipeline import map_rows, segment_slide
    from nsam.runtime.slides import ArraySlide

    engine = load(threads=threads)
    slide = ArraySlide(image, Path("image"), mpp)
    frame = Frame.of(slide, engine.card, mpp)
    network, _ = best(lambda: list(map_rows(slide, engine, frame, batch=1)))
    whole, strips = best(lambda: list(segment_slide(slide, engine, mpp, batch=1)))
    return {
        "network_s": network,
        "post_s": whole - network,
        "whole_s": whole,
        "nuclei": sum(len(strip.nuclei) for strip in strips),
        "seen_mpp": engine.card.input.mpp,
        "weights": f"its own; {engine.device}",
    }


def stardist(
    image: np.ndarray, labels: np.ndarray, mpp: float, threads: int, own_mpp: float | None = None
) -> dict[str, Any]:
    """StarDist's H&E configuration (2D_versatile_he): 32 rays, grid 2, three channels; in one pass, as by default.

    At the image's own scale, or at `own_mpp`, the resizing of image and labels timed with the rest; QuPath's
    documentation recommends about .5 µm/px. Its `n_tiles` takes less memory for the same maps, but more time, for
    tiles overlap: that would be held against it.
    """
    import tempfile

    import tensorflow as tf
    from PIL import Image
    from stardist.geometry import star_dist
    from stardist.models import Config2D, StarDist2D
    from stardist.utils import edt_prob

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    height, width = image.shape[:2]
    own_mpp = own_mpp or mpp
    shape = (round(height * mpp / own_mpp), round(width * mpp / own_mpp))

    def seen() -> np.ndarray:
        pixels = image
        if shape != (height, width):
            pixels = np.asarray(Image.fromarray(image).resize(shape[::-1], Image.Resampling.BOX))
        return pixels.astype(np.float32) / 255

    def resized(found: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
        if found.shape == size_hw:
            return found
        return np.asarray(Image.fromarray(found.astype(np.int32)).resize(size_hw[::-1], Image.Resampling.NEAREST))

    weights = "pretrained"
    try:
        model = StarDist2D.from_pretrained("2D_versatile_he")
        if model is None:
            raise OSError("no weights")
    except Exception:  # whatever the download raises
        weights = "random: they cannot be downloaded here; post-processing on the true labels' maps"
        model = StarDist2D(Config2D(n_rays=32, grid=(2, 2), n_channel_in=3), basedir=tempfile.mkdtemp())
    network, _ = best(lambda: model.predict(seen()))
    grid = (slice(None, None, 2),) * 2
    truth = resized(labels, shape)
    probability = edt_prob(truth)[grid]
    distances = star_dist(truth, 32)[grid]
    model.thresholds = {"prob": 0.69, "nms": 0.3}  # those of 2D_versatile_he

    def separated() -> tuple[np.ndarray, dict[str, Any]]:
        found, polygons = model._instances_from_prediction(shape, probability.copy(), distances.copy())
        return resized(found, (height, width)), polygons

    post, (_, polygons) = best(separated)
    return {
        "network_s": network,
        "post_s": post,
        "nuclei": len(polygons["prob"]),
        "seen_mpp": own_mpp,
        "weights": weights,
    }


def instanseg(image: np.ndarray, labels: np.ndarray, mpp: float, threads: int) -> dict[str, Any]:
    """InstanSeg's brightfield nucleus model, at its own scale of .5 µm/px; without weights its network alone."""
    import torch
    from instanseg import InstanSeg

    torch.set_num_threads(threads)
    own_mpp = 0.5
    try:
        model = InstanSeg("brightfield_nuclei", verbosity=0)
    except Exception:  # whatever the download raises
        from instanseg.utils.models.InstanSeg_UNet import InstanSeg_UNet

        # As released: offsets, their variances and seeds; 32 to 256 channels.
        network = InstanSeg_UNet(3, [[2, 2, 1]]).eval()
        side = [round(length * mpp / own_mpp) // 32 * 32 for length in image.shape[:2]]
        pixels = torch.rand(1, 3, *side)
        with torch.inference_mode():
            seconds, _ = best(lambda: network(pixels))
        weights = "random: they cannot be downloaded here; the network alone"
        return {"network_s": seconds, "seen_mpp": own_mpp, "weights": weights}
    whole, found = best(lambda: model.eval_small_image(image, mpp))
    nuclei = int(np.asarray(found[0]).max())
    return {"whole_s": whole, "nuclei": nuclei, "seen_mpp": own_mpp, "weights": "pretrained"}


def hovernet(image: np.ndarray, labels: np.ndarray, mpp: float, threads: int) -> dict[str, Any]:
    """HoVer-Net's fast mode as in MONAI: tiles of 256 px, of which 164 are kept; its network alone."""
    from monai.networks.nets import HoVerNet

    network = HoVerNet(mode="fast", in_channels=3, out_classes=5)
    return tiled(network, image, mpp, threads, own_mpp=0.25, tile=256, step=164)


def hovernext(image: np.ndarray, labels: np.ndarray, mpp: float, threads: int) -> dict[str, Any]:
    """HoVer-NeXt (Baumann et al., MIDL 2024): ConvNeXt V2 tiny and two U-Net decoders without BatchNorm, at .5 µm/px.

    Its network alone, one view of each tile of 256 px, of which 248 are kept; by default it takes four views.
    """
    import segmentation_models_pytorch as smp
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            # 5 channels part the nuclei, 8 class them.
            parts = (
                smp.Unet("tu-convnextv2_tiny", encoder_weights=None, classes=n, decoder_use_norm=False) for n in (5, 8)
            )
            self.instances, self.classes = parts

        def forward(self, x: Any) -> Any:
            features = self.instances.encoder(x)
            return [part.segmentation_head(part.decoder(features)) for part in (self.instances, self.classes)]

    return tiled(Network(), image, mpp, threads, own_mpp=0.5, tile=256, step=248)


def cellpose(image: np.ndarray, labels: np.ndarray, mpp: float, threads: int) -> dict[str, Any]:
    """Cellpose-SAM: tiles of 256 px that overlap by a tenth, at the image's own scale; its network alone."""
    from cellpose.vit import CPSAM

    return tiled(CPSAM(), image, mpp, threads, own_mpp=mpp, tile=256, step=round(256 * 0.9))


def tiled(
    network: Any, image: np.ndarray, mpp: float, threads: int, own_mpp: float, tile: int, step: int
) -> dict[str, Any]:
    """Seconds of a torch network with random weights over all tiles of the region: those of one, times their number."""
    import torch

    torch.set_num_threads(threads)
    network.eval()
    pixels = torch.rand(1, 3, tile, tile)
    with torch.inference_mode():
        seconds, _ = best(lambda: network(pixels))
    count = 1
    for side in image.shape[:2]:
        count *= max(1, -(-round(side * mpp / own_mpp) // step))
    weights = f"random: the network alone, {count} times one tile"
    return {"network_s": seconds * count, "seen_mpp": own_mpp, "weights": weights}


def classical(image: np.ndarray, labels: np.ndarray, mpp: float, threads: int) -> dict[str, Any]:
    """Colour deconvolution, Otsu, watershed of the distance: no network at all."""
    import cv2
    from skimage.measure import regionprops_table

    cv2.setNumThreads(threads)

    def run() -> np.ndarray:
        found = classical_labels(image, mpp)
        regionprops_table(found, properties=("label", "area", "centroid"))
        return found

    whole, found = best(run)
    return {"whole_s": whole, "nuclei": int(found.max()), "seen_mpp": mpp, "weights": "none needed"}


def classical_labels(image: np.ndarray, mpp: float) -> np.ndarray:
    """Nuclei (H, W) int32 by the classical chain."""
    import cv2
    from scipy import ndimage
    from skimage.color import rgb2hed
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    stain = ndimage.gaussian_filter(rgb2hed(image)[..., 0], 1)
    mask = stain > threshold_otsu(stain)
    mask = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3), np.uint8)) > 0
    depth = cv2.distanceTransform(mask.astype(np.uint8), cv2.DIST_L2, 5)
    peaks = peak_local_max(depth, min_distance=round(2 / mpp), labels=mask.astype(np.int32))
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    found: np.ndarray = watershed(-depth, seeds, mask=mask)
    return found


def main() -> None:
    """TASK IMAGE LABELS MPP THREADS."""
    task, image_path, labels_path, mpp, threads = sys.argv[1:]
    image = tifffile.imread(image_path)[..., :3]
    labels = tifffile.imread(labels_path).astype(np.int32)
    peers: dict[str, Callable[..., dict[str, Any]]] = {
        f.__name__: f for f in (nsam, stardist, instanseg, hovernet, hovernext, cellpose, classical)
    }
    peers["stardist-0.5"] = partial(stardist, own_mpp=0.5)
    row = peers[task](image, labels, float(mpp), int(threads))
    row["mm2"] = image.shape[0] * image.shape[1] * (float(mpp) / 1000) ** 2
    row["peak_mb"] = peak_mb()
    print(json.dumps(row))


if __name__ == "__main__":
    main()
