"""CLIP, DINO and LPIPS: small random models in folders, against arithmetic done here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from eval_kit import clip_of, noisy
from torch import nn

from streamq.errors import UsageError
from streamq.evaluation import clip, lpips

CPU = torch.device("cpu")


@pytest.fixture(scope="module", name="clip_folder")
def clip_folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")


def make_clip(folder: Path) -> Path:
    """A random CLIP of some kilobytes with a letter tokenizer, as save_pretrained writes one."""
    import transformers

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {**size, "vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1,
            "pad_token_id": len(words) - 1}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16
    )
    transformers.CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "do_resize": True,
                 "crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_rescale": True,
                 "rescale_factor": 1 / 255, "resample": 3, "do_convert_rgb": True, "do_normalize": True,
                 "image_mean": [0.48145466, 0.4578275, 0.40821073],
                 "image_std": [0.26862954, 0.26130258, 0.27577711]}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_clip_is_the_models_own_cosine(clip_folder: Path) -> None:
    import transformers

    encoder = clip.load_clip(str(clip_folder), CPU)
    frames = clip_of(frames=10)  # more than one batch
    images = clip.embed(encoder, frames)
    assert encoder.text is not None
    text, cut = encoder.text("a red ball")
    assert (images.shape, text.shape, cut, encoder.name) == ((10, 16), (16,), 0, "tiny-clip")
    assert np.linalg.norm(images, axis=1) == pytest.approx(1)

    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip_folder)
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.48145466, 0.4578275, 0.40821073),
                                                          (0.26862954, 0.26130258, 0.27577711)))  # fmt: skip
    with torch.no_grad():
        from PIL import Image

        small = Image.fromarray(frames[0]).resize((42, 32), Image.Resampling.BICUBIC).crop((5, 0, 37, 32))
        pixels = (torch.from_numpy(np.array(small)).permute(2, 0, 1) / 255 - mean) / std
        logits = model(**tokenizer("a red ball", return_tensors="pt"), pixel_values=pixels[None]).logits_per_image
    assert images[0] @ text == pytest.approx((logits / model.logit_scale.exp()).item(), abs=2e-3)


def test_clip_numbers_are_fixed(clip_folder: Path) -> None:
    encoder = clip.load_clip(str(clip_folder), CPU)
    images = clip.embed(encoder, clip_of(frames=3))
    again = clip.embed(clip.load_clip(str(clip_folder), CPU), clip_of(frames=3))
    assert np.array_equal(images, again)


def test_a_long_prompt_is_cut_and_says_so(clip_folder: Path) -> None:
    encoder = clip.load_clip(str(clip_folder), CPU)
    assert encoder.text is not None
    whole, cut = encoder.text("a " * 100)
    assert cut == 100 + 2 - 77
    assert np.array_equal(whole, encoder.text("a " * 150)[0])


def test_both_kinds_of_output() -> None:
    class Output:
        pooler_output = torch.ones(2)

    assert torch.equal(clip._features(Output()), torch.ones(2))
    assert torch.equal(clip._features(torch.zeros(2)), torch.zeros(2))


def test_alignment_and_consistency_by_hand() -> None:
    images = np.array([[1.0, 0], [0, 1], [-1, 0]])
    assert clip.alignment(images, np.array([0.6, 0.8])) == pytest.approx(
        {"clip_t": (0.6 + 0.8 - 0.6) / 3, "clip_score": 100 * (0.6 + 0.8) / 3}
    )
    assert clip.consecutive(images) == 0
    assert clip.consistency(images) == 0
    turned = np.array([[1.0, 0], [0.6, 0.8], [-0.6, 0.8]])
    assert clip.consecutive(turned) == pytest.approx((0.6 + 0.28) / 2)
    assert clip.consistency(turned) == pytest.approx(((0.6 + 0.6) / 2 + (0.28 + 0) / 2) / 2)
    assert clip.consistency(images[:1]) is clip.consecutive(images[:1]) is None


def test_a_still_video_is_consistent(clip_folder: Path) -> None:
    images = clip.embed(clip.load_clip(str(clip_folder), CPU), [clip_of(frames=1)[0]] * 4)
    assert clip.consecutive(images) == pytest.approx(1, abs=1e-6)
    assert clip.consistency(images) == pytest.approx(1, abs=1e-6)


def test_shuffling_lowers_consistency_and_leaves_alignment(clip_folder: Path) -> None:
    encoder = clip.load_clip(str(clip_folder), CPU)
    images = clip.embed(encoder, clip_of(frames=8, step=1))
    order = [0, 4, 1, 6, 2, 7, 3, 5]
    assert (clip.consecutive(images[order]) or 0) < (clip.consecutive(images) or 0)
    text = np.eye(16)[0]
    assert clip.alignment(images[order], text) == pytest.approx(clip.alignment(images, text))


@pytest.mark.parametrize(
    ("count", "wanted", "picked"),
    [(5, None, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (81, 3, [0, 40, 80]), (9, 1, [4]), (6, 2, [0, 5])],
)
def test_sampling(count: int, wanted: int | None, picked: list[int]) -> None:
    assert clip.sampled(count, wanted) == picked


def test_dino_is_the_class_token(tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    model.save_pretrained(tmp_path)
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 32}, "do_resize": True,
                 "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
                 "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)  # needs no scaling
    found = clip.embed(clip.load_dino(str(tmp_path), CPU), frames)
    with torch.no_grad():
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
        wanted = model(pixel_values=pixels).last_hidden_state[:, 0]
    assert found == pytest.approx((wanted / wanted.norm(dim=1, keepdim=True)).numpy(), abs=1e-5)
    with pytest.raises(UsageError, match="model_type is 'vit', 'clip' is needed"):
        clip.load_clip(str(tmp_path), CPU)


def test_models_that_are_none(tmp_path: Path, clip_folder: Path) -> None:
    with pytest.raises(UsageError, match="--clip_model .*: no config.json in it"):
        clip.load_clip(str(tmp_path), CPU)
    with pytest.raises(UsageError, match="--dino_model .*gone.*: no such file or folder, and not a hub id"):
        clip.load_dino(str(tmp_path / "gone"), CPU)
    (tmp_path / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(UsageError, match="does not load .*save_pretrained"):
        clip.load_clip(str(tmp_path), CPU)


# --- LPIPS ------------------------------------------------------------------------------------------------------------


def random_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for number, (name, shape, *_) in enumerate(lpips.LAYERS):
        fan = shape[1] * shape[2] * shape[3]
        weights[f"{name}.weight"] = torch.randn(shape, generator=generator) * (2 / fan) ** 0.5
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.1
        weights[f"lin{number}.model.1.weight"] = torch.rand(1, shape[0], 1, 1, generator=generator)
    return weights


@pytest.fixture(scope="module", name="weights")
def weights_fixture() -> dict[str, torch.Tensor]:
    return random_weights()


class AlexNetDistance(nn.Module):
    """The paper's distance out of torch's own modules, with torchvision's AlexNet written out."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(),
            nn.MaxPool2d(3, 2), nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(), nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
        )  # fmt: skip
        self.load_state_dict({f"features.{name.rsplit('.', 2)[1]}.{name.rsplit('.', 1)[1]}": tensor
                              for name, tensor in weights.items() if name.startswith("net.")})  # fmt: skip
        self.lines = [weights[f"lin{i}.model.1.weight"].flatten() for i in range(5)]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, y = ((v - shift[:, None, None]) / scale[:, None, None] for v in (a, b))
        total, taken = torch.zeros(()), 0
        for layer in self.features:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                gap = (nn.functional.normalize(x, dim=0) - nn.functional.normalize(y, dim=0)) ** 2
                total = total + torch.einsum("c,chw->hw", self.lines[taken], gap).mean()
                taken += 1
        return total


@pytest.mark.parametrize("sigma", [3.0, 30.0])
def test_lpips_is_the_papers_distance(weights: dict[str, torch.Tensor], sigma: float) -> None:
    reference = clip_of(frames=1)[0]
    candidate = noisy(reference, sigma)
    a, b = (torch.from_numpy(v).permute(2, 0, 1).float() / 255 * 2 - 1 for v in (candidate, reference))
    with torch.no_grad():
        wanted = float(AlexNetDistance(weights)(a, b))
    assert lpips.distance(weights, candidate, reference) == pytest.approx(wanted, rel=1e-5)
    assert wanted > 0.001
    assert lpips.distance(weights, reference, reference) == 0


def test_lpips_from_a_folder(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    frames = clip_of(frames=2)
    more = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "lins.0.model.1.weight": torch.zeros(1, 64, 1, 1)}
    save_file(weights | more, tmp_path / "lpips.safetensors")
    for path in (tmp_path, tmp_path / "lpips.safetensors"):
        assert lpips.load_lpips(path, CPU)(*frames) == lpips.distance(weights, *frames)
    with pytest.raises(UsageError, match=r"30\*48: lpips needs 31 pixels"):
        lpips.distance(weights, frames[0][:, :30], frames[0][:, :30])


def test_lpips_refuses_pickles_and_other_nets(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "alex.pth").write_bytes(b"")
    for path in (tmp_path, tmp_path / "alex.pth"):
        with pytest.raises(UsageError, match="a pickle, which is never opened; python -c .*save_file"):
            lpips.find_weights(path)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(UsageError, match="0 .safetensors files, one is needed"):
        lpips.find_weights(other)
    save_file({"net.slice1.0.weight": torch.zeros(1)}, other / "a.safetensors")
    with pytest.raises(UsageError, match=r"net.slice1.0.weight is \(1,\), LPIPS with AlexNet has \(64, 3, 11, 11\)"):
        lpips.load_lpips(other, CPU)
    (other / "a.safetensors").write_bytes(b"junk")
    with pytest.raises(UsageError, match="cannot be read"):
        lpips.load_lpips(other, CPU)
