"""The videos themselves: texts first, then each video through diffusers' own pipeline, then its VAE, then its files.

Text encoder, image encoder and VAE are in memory only while they are at work. The pipelines get `_VisitingVAE` in the
place of the VAE, which loads it when it is called. Source: huggingface/diffusers `pipelines/wan/pipeline_wan*.py`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from streamq import __version__
from streamq.calibration import encoders
from streamq.calibration.encoders import LatentCodec, Parts
from streamq.calibration.media import open_picture
from streamq.calibration.settings import TEXT_LEN
from streamq.checkpoint import open_checkpoint
from streamq.device import Device, open_device
from streamq.display import peak_rss
from streamq.errors import RunError, UsageError, format_duration
from streamq.extras import require
from streamq.generation.budget import Outlook, fits_whole, outlook
from streamq.generation.prepare import Job, Video
from streamq.generation.settings import DTYPES
from streamq.generation.transformer import Transformer, device_of
from streamq.savers.shard import write_whole
from streamq.videos import Sidecar, write_lossless, write_mp4, write_sidecar

About = Callable[[str], None]
Texts = dict[tuple[str, str], tuple[Tensor, Tensor | None]]  # (prompt, negative) -> their states, [1, 512, dim]


def make_videos(job: Job, about: About) -> list[Path]:
    """Make what is not done; returns all sidecars. Raises UsageError before anything is written, and RunError.

    The caller keeps other runs out of the folder (`streamq.generation.run_job`).
    """
    todo = [video for video in job.videos if not video.done]
    if len(todo) < len(job.videos):
        about(f"{len(job.videos) - len(todo)} of {len(job.videos)} videos are there already")
    if todo:
        for module in ("av", "transformers"):
            require(module, "making videos", "generate")
        device = open_device(job.settings.device)
        torch.set_num_threads(_threads())
        look = outlook(job, device)
        about(look.words())
        for one in job.weights:
            _say_unused(one.unused(), one.format_name, about)
        _make(job, todo, device, look, about)
    return [video.sidecar for video in job.videos]


def _threads() -> int:
    """What OMP_NUM_THREADS says, or every core: the CPU's device takes one, and a forward is no stream of tiles."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else len(os.sched_getaffinity(0))


def _say_unused(names: list[str], form: str | None, about: About) -> None:
    if names:
        about(f"warning: {len(names)} tensors that only {form}'s runtime uses ({names[0]}, …) have no part in this")


def _make(job: Job, todo: list[Video], device: Device, look: Outlook, about: About) -> None:
    dtype, place = getattr(torch, DTYPES[job.settings.dtype]), device_of(device)
    texts = encode_prompts(job, todo, place, dtype, look, about)
    with ExitStack() as stack:
        experts = [stack.enter_context(closing(Transformer(one, device, look.room, dtype))) for one in job.weights]
        vae = _VisitingVAE(job.parts, place, [expert.store.clear for expert in experts])
        pipe = _pipeline(job, experts, vae)
        for number, video in enumerate(todo, 1):
            progress = _Progress(about, f"video {number} of {len(todo)}", job.figures.steps)
            began = time.monotonic()
            latents = _denoise(job, pipe, video, texts[video.prompt.text, video.prompt.negative], progress)
            if not bool(torch.isfinite(latents).all()):
                raise RunError(
                    f"{video.sidecar.stem}: NaN or Inf in its latents, so there is no picture; try --dtype fp32, and"
                    f" `streamq verify {job.weights[0].folder}`"
                )
            frames = decode(vae, latents)
            made = _made(job, began, progress, device)
            _write(job, video, frames, latents, made)
            about(f"{video.sidecar.name}: {format_duration(made['seconds'])}, {video.prompt.text[:60]!r}")
        for expert in experts:
            expert.store.source.check_unchanged()


# -- Texts -------------------------------------------------------------------------------------------------------------


def encode_prompts(
    job: Job, todo: list[Video], device: torch.device, dtype: torch.dtype, look: Outlook, about: About
) -> Texts:
    """The states of every prompt. By the pipeline's own code where the text encoder fits into memory, else streamed."""
    wanted = dict.fromkeys((video.prompt.text, video.prompt.negative) for video in todo)
    guided = job.figures.guidance > 1
    folder = job.parts.text_encoder
    assert folder is not None
    size = sum(math.prod(info.shape) for info in open_checkpoint(folder).tensors.values()) * dtype.itemsize
    if not fits_whole(size, look):
        about("text encoder: streamed, as it does not fit into memory at once")
        flat = [text for pair in wanted for text in (pair if guided else pair[:1])]
        states = dict(zip(flat, encoders.encode_texts(job.parts, flat, device, dtype), strict=True))

        def padded(text: str) -> Tensor:
            one = states[text]
            return torch.nn.functional.pad(one, (0, 0, 0, TEXT_LEN - len(one)))[None].to(device)

        return {pair: (padded(pair[0]), padded(pair[1]) if guided else None) for pair in wanted}
    with encoders.text_encoder(job.parts, device, dtype) as (tokenizer, model):
        pipe = diffusers.WanPipeline(
            tokenizer=tokenizer, text_encoder=model, vae=None, scheduler=_scheduler(job), transformer=None
        )
        with torch.no_grad():
            return {
                (text, negative): pipe.encode_prompt(
                    prompt=text,
                    negative_prompt=negative,
                    do_classifier_free_guidance=guided,
                    device=device,
                    max_sequence_length=TEXT_LEN,
                )  # fmt: skip
                for text, negative in wanted
            }


def _scheduler(job: Job) -> Any:
    config = dict(job.parts.scheduler)
    name = str(config.get("_class_name"))
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if found is None:
        raise UsageError(
            f"{job.parts.root}/scheduler: {name[:80]} is not a scheduler of diffusers {diffusers.__version__}"
        )
    if job.figures.shift is not None:
        config["shift" if "shift" in config else "flow_shift"] = job.figures.shift
    return found.from_config(config)


# -- Pictures ----------------------------------------------------------------------------------------------------------


class _VisitingVAE:
    """What a pipeline sees of its VAE: configuration and dtype always, weights only during `encode` and `decode`."""

    def __init__(self, parts: Parts, device: torch.device, before: Sequence[Callable[[], None]]) -> None:
        self.device, self.dtype = device, torch.float32
        self._parts, self._before = parts, before
        with torch.device("meta"):
            empty: Any = diffusers.AutoencoderKLWan.from_config(diffusers.AutoencoderKLWan.load_config(parts.vae))
        self.config, self.temperal_downsample = empty.config, empty.temperal_downsample

    def modules(self) -> Iterator[Any]:
        """None: asked for by diffusers when it looks for hooks."""
        return iter(())

    @contextmanager
    def _present(self) -> Iterator[Any]:
        for make_room in self._before:
            make_room()
        with closing(LatentCodec(self._parts, self.device)) as codec, torch.no_grad():
            yield codec.vae

    def encode(self, *args: Any, **how: Any) -> Any:
        """AutoencoderKLWan.encode."""
        with self._present() as vae:
            return vae.encode(*args, **how)

    def decode(self, *args: Any, **how: Any) -> Any:
        """AutoencoderKLWan.decode."""
        with self._present() as vae:
            return vae.decode(*args, **how)


@torch.no_grad()
def decode(vae: Any, latents: Tensor) -> Any:
    """Latents [1, C, f, h, w] -> uint8 [F, H, W, 3], numpy: the pipelines' own arithmetic, rounded to 8 bits."""
    latents = latents.to(vae.device, dtype=vae.dtype)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    mean = torch.tensor(vae.config.latents_mean).view(shape).to(latents.device, latents.dtype)
    inverse = 1.0 / torch.tensor(vae.config.latents_std).view(shape).to(latents.device, latents.dtype)
    video = vae.decode(latents / inverse + mean, return_dict=False)[0]
    made = diffusers.video_processor.VideoProcessor(vae_scale_factor=vae.config.scale_factor_spatial)
    return (made.postprocess_video(video, output_type="np")[0] * 255).round().astype("uint8")


# -- One video ---------------------------------------------------------------------------------------------------------


def _pipeline(job: Job, experts: list[Transformer], vae: _VisitingVAE) -> Any:
    how: dict[str, Any] = {"boundary_ratio": job.boundary}
    if job.pipeline != "WanVACEPipeline":
        how["expand_timesteps"] = bool(job.parts.model_index.get("expand_timesteps", False))
    modules = [expert.module for expert in experts] + [None]
    pipe = getattr(diffusers, job.pipeline)(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=_scheduler(job),
        transformer=modules[0], transformer_2=modules[1], **how,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _denoise(
    job: Job, pipe: Any, video: Video, texts: tuple[Tensor, Tensor | None], progress: _Progress
) -> Tensor:  # fmt: skip
    """Final latents [1, C, f, h, w] fp32."""
    figures, prompt = job.figures, video.prompt
    how: dict[str, Any] = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    images = [open_picture(path) for path in (prompt.image, prompt.last_image) if path is not None]
    if job.pipeline == "WanImageToVideoPipeline":
        how |= dict(zip(("image", "last_image"), images, strict=False))
        if pipe.transformer.config.image_dim is not None:
            paths = [path for path in (prompt.image, prompt.last_image) if path is not None]
            states = torch.stack(encoders.encode_images(job.parts, paths, pipe.transformer.device, torch.float32))
            pipe.encode_image = lambda *_: states.to(pipe.transformer.device)
    elif job.pipeline == "WanVACEPipeline" and images:
        how["reference_images"] = images
    pipe.register_modules(scheduler=_scheduler(job))
    latents = pipe(
        width=figures.size[0], height=figures.size[1], num_frames=figures.frame_num,
        num_inference_steps=figures.steps, guidance_scale=figures.guidance, guidance_scale_2=figures.guidance_2,
        generator=torch.Generator("cpu").manual_seed(video.seed), output_type="latent", return_dict=False,
        callback_on_step_end=progress, **how,
    )[0]  # fmt: skip
    return latents[:, :, len(images) :].float() if "reference_images" in how else latents.float()


class _Progress:
    """Called by the pipeline after each step: says which it was, how long one takes, and how long it will be."""

    def __init__(self, about: About, video: str, steps: int) -> None:
        self._about, self._video, self._steps = about, video, steps
        self._began = time.monotonic()
        self.per_step = 0.0

    def __call__(self, pipe: Any, step: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        done = step + 1
        self.per_step = (time.monotonic() - self._began) / done
        left = format_duration(self.per_step * (self._steps - done))
        self._about(f"{self._video}, step {done} of {self._steps}: {self.per_step:.2f} s a step, {left} left")
        return {}


def _made(job: Job, began: float, progress: _Progress, device: Device) -> dict[str, Any]:
    first = job.weights[0]
    types: dict[str, int] = {}
    for one in job.weights:
        for kind, count in one.types.items():
            types[kind] = types.get(kind, 0) + count
    return {
        "streamq": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__,
        "transformer": job.transformer, "transformer_sha256": job.identity, "types": types, "format": first.format_name,
        "seconds": round(time.monotonic() - began, 3), "seconds_per_step": round(progress.per_step, 4),
        "peak_host_bytes": peak_rss(), "peak_device_bytes": device.memory()[1],
        "transformer_bytes": sum(one.nbytes for one in job.weights),
    }  # fmt: skip


def _write(job: Job, video: Video, frames: Any, latents: Tensor, made: dict[str, Any]) -> None:
    """The video's files, the sidecar last: where it is, they are."""
    from safetensors.torch import save

    place = video.sidecar
    place.unlink(missing_ok=True)
    files = {"mp4": f"{place.stem}.mp4", "mkv": f"{place.stem}.mkv", "latents": f"{place.stem}.safetensors"}
    write_mp4(place.with_name(files["mp4"]), frames, job.figures.fps)
    write_lossless(place.with_name(files["mkv"]), frames, job.figures.fps)
    write_whole(place.with_name(files["latents"]), save({"latents": latents[0].cpu().contiguous()}), 0o644)
    write_sidecar(place, Sidecar(video.pair, made, files))
