"""What a sample is conditioned on, gathered before any weight of a transformer is read: texts, pictures, clips.

All of it is kept on the host in float32 and is small beside a model. What a pipeline's encoders or the user's files do
not give is drawn at random, and said to be.

C: latent channels; f, h, w: latent frames, height and width; n: a text's tokens; S: rows that the model takes (512).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from streamq.calibration import encoders, media
from streamq.calibration.encoders import LatentCodec, Parts
from streamq.calibration.prompts import BUILT_IN
from streamq.calibration.settings import CalibSettings, Prompt, latent_shape, text_len
from streamq.errors import UsageError
from streamq.wan import Model

PICTURE_ROWS = 257  # CLIP's rows of one picture
MASK_CHANNELS = 4  # of an image condition: one for each frame of a latent frame
TEXT_STD = 0.15  # of synthetic text states: chosen to be of the order of UMT5's outputs, not measured
SYNTHETIC_TOKENS = (10, 80)  # shortest and longest synthetic text
NEGATIVE = "negative"  # the unconditional text's name in a file of text states


def seed_of(*parts: object) -> int:
    """A seed for one purpose, e.g. ("noise", 0, "low_noise_model", 3); different purposes get unrelated ones."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def drawn(shape: Iterable[int], *purpose: object) -> Tensor:
    """Standard normal float32 of a shape, from a generator of its own on the CPU, so the same for every device."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed_of(*purpose)))


def smooth_latents(shape: tuple[int, int, int, int], *purpose: object) -> Tensor:
    """[C, f, h, w]: noise in which slow changes over time and space prevail; mean 0, variance 1 for each channel.

    Octaves of noise on ever coarser grids, each twice as strong as the finer one before: amplitude about 1/frequency,
    as in natural pictures. They stand in for a video's latents where there are none.
    """
    channels, *size = shape
    total = torch.zeros(1, *shape)
    for octave in range(5):
        coarse = [max(1, -(-extent // 2**octave)) for extent in size]
        noise = drawn((1, channels, *coarse), *purpose, octave)
        total += 2**octave * functional.interpolate(noise, size=size, mode="trilinear", align_corners=False)
    flat = total[0].flatten(1)
    flat = (flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True).clamp_min(1e-6)
    return flat.unflatten(1, size)


@dataclass(frozen=True)
class Inputs:
    """What one forward of a transformer gets; see `streamq.wan.blocks.Shell.stem`."""

    latents: Tensor
    timestep: Tensor
    text: Tensor
    image: Tensor | None = None
    control: Tensor | None = None
    control_scale: Tensor | None = None


@dataclass
class Conditions:
    """See the module. Numbers are those of `prompts` and `clips`; a prompt or clip without a picture is not in a dict.

    texts        text -> [n, text_dim]
    clips        x0 of the user's videos or latents, [C, f, h, w] each; none: synthetic
    pictures     prompt -> condition channels [20, f, h, w] (TI2V: first latent frame [48, 1, h, w]) of its picture
    stills       clip -> the same of its first (and last) frame
    image_rows   prompt -> CLIP states [1, 257, image_dim], first and last frame [2, 257, image_dim]
    gray         VACE: latents of a gray clip, which stands for "no control", [16, f, h, w]
    """

    model: Model
    settings: CalibSettings
    shape: tuple[int, int, int, int]
    prompts: tuple[Prompt, ...]
    texts: dict[str, Tensor] = field(default_factory=dict)
    clips: list[Tensor] = field(default_factory=list)
    pictures: dict[int, Tensor] = field(default_factory=dict)
    stills: dict[int, Tensor] = field(default_factory=dict)
    image_rows: dict[int, Tensor] = field(default_factory=dict)
    gray: Tensor | None = None
    synthetic: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def condition_channels(self) -> int:
        """Channels besides the noisy latents: 20 in I2V, else 0."""
        return self.model.in_channels - self.model.out_channels

    @property
    def has_image_branch(self) -> bool:
        """Whether encoder_hidden_states begin with a picture's rows."""
        return _image_dim(self.model) > 0

    def states_key(self, prompt: int, text: str) -> tuple[object, ...]:
        """What tells one encoder_hidden_states from another."""
        return (text, prompt) if self.has_image_branch else (text,)

    def text(self, text: str) -> Tensor:
        """[1, S, text_dim], zero-padded: padding goes through the text embedder like the rest, and is never masked."""
        rows = self.texts[text]
        return torch.cat([rows, rows.new_zeros(text_len(self.model) - len(rows), rows.shape[1])])[None]

    def image(self, prompt: int) -> Tensor | None:
        """The image branch's input, [1 or 2, 257, image_dim]."""
        if not self.has_image_branch:
            return None
        pictures = 2 if self.model.family == "flf2v" else 1
        if prompt in self.image_rows:
            return self.image_rows[prompt]
        # A LayerNorm is the first that they meet, so their scale matters little.
        return drawn((pictures, PICTURE_ROWS, _image_dim(self.model)), "image rows", self.settings.seed, prompt)

    def still(self, prompt: int, x0: Tensor | None, clip: int | None) -> Tensor | None:
        """The picture that a video starts with: [1, 20, f, h, w], TI2V [1, 48, 1, h, w], None in other families.

        That of the prompt, else of the clip, else x0's first latent frame; None in TI2V without any of them.
        """
        if not self.condition_channels and self.model.family != "ti2v":
            return None
        if prompt in self.pictures:
            return self.pictures[prompt][None]
        if clip is not None and clip in self.stills:
            return self.stills[clip][None]
        if self.model.family == "ti2v":
            return None if x0 is None else x0[None, :, :1]
        assert x0 is not None, "an image family without a picture is given x0"
        held = torch.zeros_like(x0)
        held[:, 0] = x0[:, 0]
        if self.model.family == "flf2v":
            held[:, -1] = x0[:, -1]
        return torch.cat([still_mask(self.shape, self.model.family == "flf2v"), held])[None]

    def inputs(self, latents: Tensor, timestep: Tensor, prompt: int, text: str, still: Tensor | None) -> Inputs:
        """One forward's inputs, as diffusers' pipelines make them. latents [1, C, f, h, w]; timestep [1].

        TI2V: tokens of the given first frame are clean, at timestep 0, so that every token has a timestep.
        """
        image, control = self.image(prompt), self.control()
        if self.model.family == "ti2v":
            mask = torch.ones(1, 1, *self.shape[1:], device=latents.device)
            if still is not None:
                mask[:, :, 0] = 0
                latents = (1 - mask) * still.to(latents.device) + mask * latents
            timestep = (mask[0][0][:, ::2, ::2] * timestep).flatten()[None]
        elif still is not None:
            latents = torch.cat([latents, still.to(latents.device)], dim=1)
        return Inputs(latents, timestep, self.text(text), image, control)

    def control(self) -> Tensor | None:
        """VACE: [1, 96, f, h, w] for "no control": a gray video, inactive and reactive, and a mask of ones."""
        if self.model.family != "vace":
            return None
        frames, height, width = self.shape[1:]
        gray = torch.zeros(16, frames, height, width) if self.gray is None else self.gray
        return torch.cat([gray, gray, torch.ones(64, frames, height, width)])[None]


def still_mask(shape: tuple[int, int, int, int], last: bool) -> Tensor:
    """[4, f, h, w]: which frames are given: the first, and the last if `last`. As in WanImageToVideoPipeline."""
    _, frames, height, width = shape
    mask = torch.zeros(MASK_CHANNELS, frames, height, width)
    mask[:, 0] = 1
    if last:
        mask[-1, -1] = 1  # one frame of the last four
    return mask


def _image_dim(model: Model) -> int:
    info = model.tensors.get("condition_embedder.image_embedder.norm1.weight")
    return info.shape[0] if info else 0


def _text_dim(model: Model) -> int:
    return model.tensors["condition_embedder.text_embedder.linear_1.weight"].shape[1]


def gather(
    settings: CalibSettings, model: Model, parts: Parts, device: torch.device, about: Callable[[str], None]
) -> Conditions:
    """Run every encoder that is needed, one after the other; all of them are gone when this returns."""
    prompts = settings.prompts or tuple(Prompt(text) for text in BUILT_IN)
    found = Conditions(model, settings, latent_shape(model, settings), prompts)
    _gather_texts(found, parts, device, about)
    if found.has_image_branch:
        _gather_image_rows(found, parts, device)
    _gather_latents(found, parts, device, about)
    for what in found.synthetic:
        about(f"synthetic: {what}")
    for warning in found.warnings:
        about(f"warning: {warning}")
    return found


def _gather_texts(found: Conditions, parts: Parts, device: torch.device, about: Callable[[str], None]) -> None:
    settings, width = found.settings, _text_dim(found.model)
    if settings.text_embeds is not None:
        _read_texts(found, settings.text_embeds)
    else:
        texts = list(dict.fromkeys([p.text for p in found.prompts] + [p.negative for p in found.prompts]))
        if parts.text_encoder is not None:
            about(f"encoding {len(texts)} texts")
            dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
            states = encoders.encode_texts(parts, texts, device, dtype)
            found.texts = dict(zip(texts, states, strict=True))
        else:
            found.texts = {text: _synthetic_text(settings.seed, text, width) for text in texts}
            found.synthetic.append("text states (no text encoder beside the transformer, no --text_embeds): random")
    longest = text_len(found.model)
    for text, rows in found.texts.items():
        if rows.ndim != 2 or rows.shape[1] != width or len(rows) > longest:
            raise UsageError(
                f"text states of {text[:60]!r}: {list(rows.shape)}, this model takes up to {longest} rows of {width};"
                " make them with its own text encoder"
            )
    found.texts = {text: rows.to("cpu") for text, rows in found.texts.items()}


def _read_texts(found: Conditions, path: Path) -> None:
    given = media.read_text_embeds(path, _text_dim(found.model))
    names = [name for name, _ in given if name != NEGATIVE]
    if not names:
        raise UsageError(f"--text_embeds {path}: no text besides {NEGATIVE!r} in it; add the states of some prompts")
    found.texts = dict(given)
    if NEGATIVE not in found.texts:
        found.texts[NEGATIVE] = torch.zeros(1, _text_dim(found.model))
        found.warnings.append(f"--text_embeds {path.name} has no {NEGATIVE!r}: samples without a prompt get zeros")
    found.prompts = tuple(Prompt(name, NEGATIVE) for name in names)


def _synthetic_text(seed: int, text: str, width: int) -> Tensor:
    """[n, width]: gaussian rows, the same for the same text; an empty one has only its end token."""
    shortest, longest = SYNTHETIC_TOKENS
    count = shortest + seed_of("length", seed, text) % (longest - shortest + 1) if text else 1
    return TEXT_STD * drawn((count, width), "text", seed, text)


def _gather_image_rows(found: Conditions, parts: Parts, device: torch.device) -> None:
    wanted = {i: p for i, p in enumerate(found.prompts) if p.image is not None}
    if wanted and parts.image_encoder is not None:
        paths = list(dict.fromkeys(path for p in wanted.values() for path in _ends(found, p)))
        dtype = torch.bfloat16 if found.settings.dtype == "bf16" else torch.float32
        rows = dict(zip(paths, encoders.encode_images(parts, paths, device, dtype), strict=True))
        found.image_rows = {
            i: torch.stack([rows[path].reshape(-1, rows[path].shape[-1]).to("cpu") for path in _ends(found, p)])
            for i, p in wanted.items()
        }
    if len(found.image_rows) < len(found.prompts):
        why = "no image encoder beside the transformer" if parts.image_encoder is None else "prompts without a picture"
        found.synthetic.append(f"image states ({why}): random")


def _ends(found: Conditions, prompt: Prompt) -> list[Path]:
    """A prompt's pictures; one that lacks the last of two ends as it begins."""
    assert prompt.image is not None
    return [prompt.image, prompt.last_image or prompt.image] if found.model.family == "flf2v" else [prompt.image]


def _gather_latents(found: Conditions, parts: Parts, device: torch.device, about: Callable[[str], None]) -> None:
    settings, model, shape = found.settings, found.model, found.shape
    wants_still = model.family == "ti2v" or found.condition_channels > 0
    wants_pictures = wants_still and any(p.image for p in found.prompts)
    if settings.videos is not None and parts.vae is None:
        raise UsageError(f"--videos {settings.videos}: no vae/ beside the transformer to encode them; give --latents")
    if settings.latents is not None:
        found.clips = media.read_latents(settings.latents, shape)
    if parts.vae is not None and (settings.videos is not None or wants_pictures or model.family == "vace"):
        codec = LatentCodec(parts, device)
        try:
            _encode(found, codec, about)
        finally:
            codec.close()
    if settings.mode == "interpolate" and not found.clips:
        found.synthetic.append("latents (no --videos, no --latents): smooth noise")
    if wants_pictures and parts.vae is None:
        found.warnings.append("the prompts' pictures are left out: no vae/ beside the transformer to encode them")
    if found.condition_channels and not found.pictures and not found.stills:
        found.synthetic.append("image condition: the first latent frame of each sample's latents")
    if model.family == "vace" and found.gray is None:
        found.synthetic.append("control latents (no vae/ beside the transformer): zeros")


def _encode(found: Conditions, codec: LatentCodec, about: Callable[[str], None]) -> None:
    settings, model = found.settings, found.model
    if codec.z_dim != model.out_channels:
        raise UsageError(
            f"{model.checkpoint.root.parent}: its VAE has {codec.z_dim} latent channels, the transformer"
            f" {model.out_channels}; they do not belong together"
        )
    width, height = settings.size
    still = model.family == "ti2v" or found.condition_channels > 0
    if settings.videos is not None:
        clips = media.read_clips(settings.videos, settings.size, settings.frame_num, found.warnings)
        for number, clip in enumerate(islice(clips, settings.num_samples)):
            about(f"encoding clip {number + 1}")
            found.clips.append(codec.encode(clip).to("cpu"))
            if found.condition_channels:
                found.stills[number] = _still_of(found, codec, clip)
    for number, prompt in enumerate(found.prompts):
        if not still or prompt.image is None:
            continue
        if model.family == "ti2v":
            found.pictures[number] = codec.first_frame(prompt.image, settings.size).to("cpu")
        else:
            last = (prompt.last_image or prompt.image) if model.family == "flf2v" else None
            made = codec.image_condition(prompt.image, last, settings.size, settings.frame_num)
            found.pictures[number] = made.to("cpu")
    if model.family == "vace":
        found.gray = codec.encode(torch.zeros(3, settings.frame_num, height, width)).to("cpu")


def _still_of(found: Conditions, codec: LatentCodec, clip: Tensor) -> Tensor:
    """[20, f, h, w]: a clip's first (and last) frame, gray in between, as WanImageToVideoPipeline conditions."""
    held = torch.zeros_like(clip)
    held[:, 0] = clip[:, 0]
    if found.model.family == "flf2v":
        held[:, -1] = clip[:, -1]
    return torch.cat([still_mask(found.shape, found.model.family == "flf2v"), codec.encode(held).to("cpu")])
