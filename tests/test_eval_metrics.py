"""Metrics against other packages, formulas, and videos whose numbers are known beforehand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from eval_kit import clip_of, noisy

from streamq.errors import UsageError
from streamq.evaluation.metrics import (
    METRICS,
    PIXELS,
    latent_metrics,
    motion_metrics,
    motion_series_dev,
    own_facts,
    pixel_metrics,
    ssim_frame,
)


@pytest.fixture(scope="module", name="pair")
def pair_fixture() -> tuple[np.ndarray, np.ndarray]:
    reference = clip_of(frames=4)
    return noisy(reference, 12), reference


def both(candidate: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    return pixel_metrics(zip(candidate, reference, strict=True))


def test_identical_videos(pair: tuple[np.ndarray, np.ndarray]) -> None:
    found = both(pair[1], pair[1])
    assert found == {"psnr_video": math.inf, "psnr_frame": 100.0, "ssim": 1.0, "mae": 0.0, "rel_l2": 0.0, "cos": 1.0}
    assert tuple(sorted(found)) == tuple(sorted(PIXELS))


def test_ssim_and_psnr_are_scikit_images(pair: tuple[np.ndarray, np.ndarray]) -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    candidate, reference = pair
    found = both(candidate, reference)
    wanted = [
        structural_similarity(b, a, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        for a, b in zip(candidate, reference, strict=True)
    ]
    assert found["ssim"] == pytest.approx(np.mean(wanted), rel=1e-9)
    assert found["psnr_video"] == pytest.approx(peak_signal_noise_ratio(reference, candidate), rel=1e-12)
    frames = [peak_signal_noise_ratio(b, a) for a, b in zip(candidate, reference, strict=True)]
    assert found["psnr_frame"] == pytest.approx(np.mean(frames), rel=1e-12)


def test_ssim_and_psnr_are_torchmetrics(pair: tuple[np.ndarray, np.ndarray]) -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a, b = (torch.from_numpy(frames).permute(0, 3, 1, 2).double() for frames in pair)
    found = both(*pair)
    # it also counts positions where the window hangs over the border
    _, whole = structural_similarity_index_measure(a, b, data_range=255.0, sigma=1.5, return_full_image=True)
    assert found["ssim"] == pytest.approx(float(whole[:, :, 5:-5, 5:-5].mean()), rel=1e-6)
    assert found["psnr_video"] == pytest.approx(float(peak_signal_noise_ratio(a, b, data_range=255.0)), rel=1e-6)


def test_pixels_are_the_formulas(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = (frames.astype(np.float64).ravel() for frames in pair)
    found = both(*pair)
    assert found["mae"] == pytest.approx(np.abs(a - b).mean(), rel=1e-12)
    assert found["rel_l2"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), rel=1e-12)
    assert found["cos"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)


@pytest.mark.parametrize("sigma", [2.0, 8.0])
def test_noise_of_known_power_has_its_psnr(sigma: float) -> None:
    grey = np.full((8, 48, 64, 3), 128, np.uint8)
    # rounding to whole levels adds a twelfth to the power
    wanted = 10 * math.log10(255**2 / (sigma**2 + 1 / 12))
    found = both(noisy(grey, sigma), grey)
    assert found["psnr_video"] == pytest.approx(wanted, abs=0.05)
    assert found["psnr_frame"] >= found["psnr_video"] - 1e-9  # Jensen: the mean of logarithms


def test_one_wrong_frame_tells_the_two_psnrs_apart() -> None:
    reference = np.full((4, 16, 16, 3), 100, np.uint8)
    candidate = reference.copy()
    candidate[2] += 10
    found = both(candidate, reference)
    assert found["psnr_video"] == pytest.approx(10 * math.log10(255**2 / 25))
    assert found["psnr_frame"] == pytest.approx((300 + 10 * math.log10(255**2 / 100)) / 4)


def test_more_noise_is_worse_in_every_metric() -> None:
    reference = clip_of(frames=3)
    found = [both(noisy(reference, sigma), reference) for sigma in (1, 4, 16)]
    for metric in PIXELS:
        sign = 1 if METRICS[metric].better == "higher" else -1
        values = [sign * one[metric] for one in found]
        assert values[0] > values[1] > values[2], metric


def test_frames_of_other_sizes_and_tiny_ones_are_refused() -> None:
    small, large = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 16, 8, 3), np.uint8)
    with pytest.raises(UsageError, match=r"\[8, 8, 3\] and \[16, 8, 3\]"):
        both(small, large)
    with pytest.raises(UsageError, match=r"8\*8: ssim's window needs 11"):
        ssim_frame(small[0], small[0])
    assert both_without_ssim(small)["psnr_video"] == math.inf


def both_without_ssim(frames: np.ndarray) -> dict[str, float]:
    return pixel_metrics(zip(frames, frames, strict=True), with_ssim=False)


def test_latents() -> None:
    generator = np.random.default_rng(0)
    b = generator.normal(size=(16, 3, 6, 8)).astype(np.float32)
    assert latent_metrics(b, b) == {"latent_rel_l2": 0.0, "latent_cos": 1.0}
    assert latent_metrics(b * np.float32(1.25), b)["latent_rel_l2"] == pytest.approx(0.25, rel=1e-6)
    assert latent_metrics(b * np.float32(1.25), b)["latent_cos"] == pytest.approx(1, rel=1e-9)
    a = b + generator.normal(size=b.shape).astype(np.float32) * np.float32(0.1)
    found = latent_metrics(a, b)
    x, y = (torch.from_numpy(v).double().flatten() for v in (a, b))
    assert found["latent_cos"] == pytest.approx(float(torch.cosine_similarity(x, y, dim=0)), rel=1e-12)
    assert found["latent_rel_l2"] == pytest.approx(float((x - y).norm() / y.norm()), rel=1e-12)
    with pytest.raises(UsageError, match="equal shapes"):
        latent_metrics(a[:1], b)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_known_shift_has_the_known_flow(step: int) -> None:
    facts = own_facts(clip_of(frames=4, step=step), with_motion=True)
    found = motion_metrics(facts, 16)
    assert found["motion"] == pytest.approx(step, rel=0.01)
    assert found["motion_norm"] == pytest.approx(found["motion"] * 16 / 48, rel=1e-12)
    assert len(facts.series) == 3


def test_a_still_video() -> None:
    facts = own_facts([clip_of(frames=1)[0]] * 4, with_motion=True)
    assert facts.flicker == 1.0
    assert facts.series == (0.0, 0.0, 0.0)
    assert motion_metrics(facts, 16) == {"motion": 0.0, "motion_norm": 0.0}
    single = own_facts(clip_of(frames=1), with_motion=True)
    assert (single.flicker, single.series, motion_metrics(single, 16)) == (None, (), {})


def test_flicker_is_vbenchs() -> None:
    frames = noisy(clip_of(frames=4), 5)
    gaps = [np.abs(b.astype(float) - a.astype(float)).mean() for a, b in pairwise(frames)]
    assert own_facts(frames, with_motion=False).flicker == pytest.approx((255 - np.mean(gaps)) / 255, rel=1e-12)


def test_shuffled_frames_lower_temporal_numbers_only() -> None:
    frames = clip_of(frames=8, step=1)
    order = [0, 4, 1, 6, 2, 7, 3, 5]
    plain, shuffled = (own_facts(video, with_motion=True) for video in (frames, frames[order]))
    assert plain.flicker is not None and shuffled.flicker is not None
    assert shuffled.flicker < plain.flicker
    assert sum(shuffled.series) > 1.5 * sum(plain.series)
    # what knows no order stays as it was
    assert both(frames[order], frames[order]) == both(frames, frames)
    noise = noisy(frames, 5)
    assert both(noise[order], frames[order])["psnr_video"] == both(noise, frames)["psnr_video"]


def test_a_jumpy_video_with_the_same_mean_motion_shows() -> None:
    assert motion_series_dev((2.0, 2.0, 2.0), (2.0, 2.0, 2.0)) == 0
    assert motion_series_dev((0.0, 6.0, 0.0), (2.0, 2.0, 2.0)) == pytest.approx(4 / 3)
    assert motion_series_dev((0.0, 0.0), (2.0, 2.0)) == 1  # frozen
    assert motion_series_dev((0.0, 0.0), (0.0, 0.0)) == 0
    assert motion_series_dev((1.0, 0.0), (0.0, 0.0)) == math.inf


def test_black_frames_are_found() -> None:
    frames = clip_of(frames=4)
    frames[2] = 2
    assert own_facts(frames, with_motion=False).black == (2,)
    assert own_facts(clip_of(frames=2), with_motion=False).black == ()
