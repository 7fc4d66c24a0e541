"""What a pipeline's text encoder, image encoder and VAE make of texts, pictures and clips, in bounded memory.

They live in a diffusers pipeline's folders; native Wan-AI folders keep theirs in pickles, which are never opened.
Nothing here reaches a network: every loader is given a folder and told to stay there.

The text encoder is the large one (UMT5-XXL: 5.68 B parameters, 22.7 GB in fp32). It is built without weights, and one
layer at a time is read from its safetensors files; of the token embedding only the rows that occur are read.
"""

from __future__ import annotations

import gc
import html
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamq.calibration.media import TORCH_DTYPES, open_picture, read_image, read_rows
from streamq.calibration.settings import TEXT_LEN
from streamq.checkpoint import Checkpoint, Source, load_json, open_checkpoint
from streamq.errors import RunError, UsageError
from streamq.extras import require

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_CONFIG_BYTES = 4 << 20
TRANSFORMERS = ("transformer", "transformer_2")
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor under two names


@dataclass(frozen=True)
class Parts:
    """Folders of a diffusers pipeline; None where it has no such part."""

    root: Path | None
    text_encoder: Path | None
    tokenizer: Path | None
    vae: Path | None
    image_encoder: Path | None
    image_processor: Path | None
    scheduler: dict[str, Any]
    model_index: dict[str, Any]


def find_parts(model_path: Path) -> Parts:
    """The pipeline that a path belongs to: its folder, its transformer's folder, or a file in one.

    A bare transformer and a native Wan-AI folder have no parts. Raises UsageError for JSON that cannot be read.
    """
    path = model_path.absolute()  # not resolved: a hub cache's links lead out of the pipeline
    folder = path if path.is_dir() else path.parent
    root = next((f for f in (folder, folder.parent) if _is_pipeline(f, folder)), None)
    if root is None:
        return Parts(None, None, None, None, None, None, {}, {})

    def part(name: str, mark: str = "config.json") -> Path | None:
        return root / name if (root / name / mark).is_file() else None

    return Parts(
        root, part("text_encoder"), part("tokenizer", "tokenizer_config.json"), part("vae"), part("image_encoder"),
        part("image_processor", "preprocessor_config.json"), _json(root / "scheduler" / "scheduler_config.json"),
        _json(root / "model_index.json"),
    )  # fmt: skip


def _is_pipeline(root: Path, asked: Path) -> bool:
    if root != asked and asked.name not in TRANSFORMERS:
        return False
    parts = ("text_encoder/config.json", "vae/config.json")
    return (root / "model_index.json").is_file() or any((root / part).is_file() for part in parts)


def _json(path: Path) -> dict[str, Any]:
    document = load_json(path, MAX_CONFIG_BYTES) if path.is_file() else {}
    if not isinstance(document, dict):
        raise UsageError(f"{path}: JSON of type {type(document).__name__}, not an object; download it again")
    return document


def _need(folder: Path | None, parts: Parts, name: str, instead: str) -> Path:
    if folder is None:
        where = f"{parts.root} has no {name}/" if parts.root else f"this model comes without a {name}"
        raise UsageError(f"{where}, which this needs; give the diffusers pipeline's folder, or {instead}")
    return folder


def prompt_clean(text: str) -> str:
    """A prompt as the Wan pipelines clean it: mojibake mended where ftfy is installed, entities and spaces."""
    if importlib.util.find_spec("ftfy") is not None:
        text = require("ftfy", "cleaning prompts").fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip()


# --- texts ------------------------------------------------------------------------------------------------------------


def encode_texts(parts: Parts, texts: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Each text's states, [n tokens, text_dim] of `dtype` on the CPU: what `encode_prompt` gives before its padding.

    All texts pass through a layer before the next is read, each at its own length; at most 512 tokens count. In
    fp32 the result differs from the pipeline's, which computes 512 padded tokens, by rounding.
    """
    if not texts:
        return []
    import torch

    unreadable = require("safetensors", "text encoding").SafetensorError
    folder = _need(parts.text_encoder, parts, "text_encoder", "--text_embeds")
    checkpoint = open_checkpoint(folder)
    cleaned = [prompt_clean(text) for text in texts]
    distinct = list(dict.fromkeys(cleaned))
    tokens = _tokenize(_need(parts.tokenizer, parts, "tokenizer", "--text_embeds"), distinct)
    flat = [token for one in tokens for token in one]
    lengths = [len(one) for one in tokens]
    states: Any = None
    model: Any = None
    try:
        with closing(Source(checkpoint)) as source, torch.no_grad():
            states = _embed(source, flat, dtype).to(device)
            model = _umt5(folder, checkpoint, dtype)
            _stream(model, checkpoint, device, lengths)
            found = model(inputs_embeds=states[None]).last_hidden_state[0].to("cpu", dtype)
            source.check_unchanged()
    except (OSError, unreadable) as error:
        raise RunError(f"{folder}: could not be read ({error}); run again once it can be") from error
    finally:
        states = model = None
        _release(device)
    pieces = dict(zip(distinct, found.split(lengths), strict=True))
    return [pieces[text].clone() for text in cleaned]


@contextmanager
def text_encoder(parts: Parts, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, Any]]:
    """The tokenizer and the whole UMT5EncoderModel, in memory for as long as the `with` block. Raises UsageError."""
    transformers = require("transformers", "text encoding")
    folder = _need(parts.text_encoder, parts, "text_encoder", "--text_embeds")
    words = _need(parts.tokenizer, parts, "tokenizer", "--text_embeds")
    here = {"local_files_only": True}
    tokenizer = _loaded(words, lambda: transformers.AutoTokenizer.from_pretrained(words, **here))
    kind, how = transformers.UMT5EncoderModel, here | {"use_safetensors": True, "dtype": dtype}
    model = _loaded(folder, lambda: kind.from_pretrained(folder, **how)).to(device).eval()
    try:
        yield tokenizer, model
    finally:
        model = None
        _release(device)


def _tokenize(folder: Path, texts: list[str]) -> list[list[int]]:
    auto = require("transformers", "text encoding").AutoTokenizer
    tokenizer = _loaded(folder, lambda: auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False))
    found = tokenizer(texts, max_length=TEXT_LEN, truncation=True, add_special_tokens=True, padding=False)
    for text, ids in zip(texts, found.input_ids, strict=True):
        if not ids:
            raise UsageError(f"{folder}: makes no token of {text[:80]!r}, Wan's ends every text with one; check it")
    return [list(map(int, ids)) for ids in found.input_ids]


def _embed(source: Source, ids: list[int], dtype: torch.dtype) -> Tensor:
    """Rows of the token embedding, [n, D]: read one by one, since all 256,384 would take 4.2 GB."""
    import torch

    tensors = source.checkpoint.tensors
    info = next((tensors[name] for name in EMBEDDING if name in tensors), None)
    if info is None or len(info.shape) != 2 or info.dtype not in TORCH_DTYPES:
        raise UsageError(f"{source.checkpoint.root}: no token embedding ({EMBEDDING[0]}) in it; download it again")
    if max(ids) >= info.shape[0]:
        raise UsageError(
            f"{source.checkpoint.where(info)}: {info.shape[0]} tokens, the tokenizer gives number {max(ids)};"
            " the two do not belong together: download both again"
        )
    rows = {number: read_rows(source, info, number, 1)[0].to(dtype) for number in sorted(set(ids))}
    return torch.stack([rows[number] for number in ids])


def _umt5(folder: Path, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A UMT5EncoderModel on the meta device, of the dtypes that `from_pretrained` gives. Raises UsageError."""
    import torch

    transformers = require("transformers", "text encoding")
    accelerate = require("accelerate", "text encoding")
    kind = _json(folder / "config.json").get("model_type")
    if kind != "umt5":
        raise UsageError(f"{folder}/config.json: model_type {kind!r}, Wan's text encoder is 'umt5'; check the pipeline")
    config = _loaded(folder, lambda: transformers.UMT5Config.from_pretrained(folder, local_files_only=True))
    with accelerate.init_empty_weights():
        model = _loaded(folder, lambda: transformers.UMT5EncoderModel(config)).eval().to(dtype)
    if dtype == torch.float16:  # where from_pretrained keeps `wo` wide: with bfloat16 it does not
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in (model._keep_in_fp32_modules or ()):
                module.to(torch.float32)
    for name, parameter in model.named_parameters():
        info = checkpoint.tensors.get(name)
        if name in EMBEDDING or (info and info.shape == parameter.shape and info.dtype in TORCH_DTYPES):
            continue
        there = f"is {info.dtype} {list(info.shape)}" if info else "is missing"
        raise UsageError(
            f"{folder}: {name} {there}, its config.json makes it {list(parameter.shape)} of floats;"
            " download the text encoder again"
        )
    return model


def _stream(model: Any, checkpoint: Checkpoint, device: torch.device, lengths: list[int]) -> None:
    """Make the model read each layer from its files when it is called, drop it after, and know several texts.

    The texts lie one after the other in one sequence, [1, n, D]. A layer gets them one by one and without a mask: no
    padding is computed, and what one needs for its attention is gone before the next.
    """
    accelerate = require("accelerate", "text encoding")

    def one_by_one(forward: Callable[..., Any]) -> Callable[..., Any]:
        def split(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            import torch

            results = [forward(part) for part in hidden_states.split(lengths, dim=1)]
            whole = torch.cat([one[0] if isinstance(one, tuple) else one for one in results], dim=1)
            return (whole,) if isinstance(results[0], tuple) else whole  # a tuple before transformers 5

        return split

    for layer in model.encoder.block:
        layer.forward = one_by_one(layer.forward)
    index = {
        name: {"safetensors_file": str(checkpoint.files[info.file].path), "weight_name": name,
               "dtype": TORCH_DTYPES[info.dtype]}
        for name, info in checkpoint.tensors.items() if name not in EMBEDDING and info.dtype in TORCH_DTYPES
    }  # fmt: skip
    with _quiet("accelerate.big_modeling"):  # it warns that parameters are on the meta device, as they shall be
        accelerate.dispatch_model(
            model, {"": "disk"}, main_device=str(device), offload_index=index,
            preload_module_classes=[type(model.encoder.block[0]).__name__], force_hooks=True,
        )  # fmt: skip


# --- pictures ---------------------------------------------------------------------------------------------------------


def encode_images(parts: Parts, images: Sequence[Path], device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """CLIP's next to last states of each picture, [257, 1280] of `dtype` on the CPU, as Wan2.1's pipelines use them.

    A first and a last frame are two pictures; the model takes their states one after the other.
    """
    if not images:
        return []
    import torch

    transformers = require("transformers", "image encoding")
    folder = _need(parts.image_encoder, parts, "image_encoder", "a model without an image branch")
    settings = _need(parts.image_processor, parts, "image_processor", "a model without an image branch")
    processor = _loaded(settings, lambda: _processor(transformers, settings))
    pictures = [open_picture(path) for path in images]
    how = {"local_files_only": True, "use_safetensors": True, "dtype": dtype}
    try:
        model = _loaded(folder, lambda: transformers.CLIPVisionModel.from_pretrained(folder, **how)).to(device).eval()
        found = []
        with torch.no_grad():
            for picture in pictures:
                inputs = processor(images=picture, return_tensors="pt").to(device, dtype)
                found.append(model(**inputs, output_hidden_states=True).hidden_states[-2][0].to("cpu"))
    finally:
        model = None
        _release(device)
    return found


def _processor(transformers: Any, settings: Path) -> Any:
    with _quiet("transformers"):  # without torchvision it says that Pillow is used instead
        return transformers.CLIPImageProcessor.from_pretrained(settings, local_files_only=True)


# --- the VAE ----------------------------------------------------------------------------------------------------------


class LatentCodec:
    """A pipeline's VAE, loaded once; `close()` lets go, and so does the end of a `with` block.

    Everything given and taken is on the CPU and float32; inside, `dtype` counts (float32 as the pipelines advise).
    """

    def __init__(self, parts: Parts, device: torch.device, dtype: torch.dtype | None = None) -> None:
        import torch

        folder = _need(parts.vae, parts, "vae", "--latents")
        kind = require("diffusers", "the VAE").AutoencoderKLWan
        how = {"local_files_only": True, "use_safetensors": True}
        self.device = device
        self._vae: Any = _loaded(folder, lambda: kind.from_pretrained(folder, **how))
        with _quiet("diffusers"):  # it warns of modules to be kept in float32, of which this VAE has none
            self._vae = self._vae.to(device, dtype or torch.float32).eval()
        config = self._vae.config
        self.z_dim = int(config.z_dim)
        self._mean = torch.tensor(config.latents_mean).view(1, self.z_dim, 1, 1, 1).to(device)
        self._inverse = 1.0 / torch.tensor(config.latents_std).view(1, self.z_dim, 1, 1, 1).to(device)

    @property
    def vae(self) -> Any:
        """diffusers' AutoencoderKLWan itself."""
        return self._vae

    def encode(self, video: Tensor) -> Tensor:
        """[3, F, H, W] in -1..1 -> latents [C, f, h, w], normalised, the distribution's mode."""
        import torch

        with torch.no_grad():
            latents = self._vae.encode(video[None].to(self.device, self._vae.dtype)).latent_dist.mode()
            return ((latents.float() - self._mean) * self._inverse)[0].cpu()

    def decode_first(self, latents: Tensor) -> Tensor:
        """[C, f, h, w] -> the first frame alone, uint8 [H, W, 3]. The VAE is causal: later latents do not count."""
        import torch

        with torch.no_grad():
            latent = latents[None, :, :1].to(self.device, torch.float32) / self._inverse + self._mean
            frame = self._vae.decode(latent.to(self._vae.dtype), return_dict=False)[0][0, :, 0]
            pixels = (frame.float() / 2 + 0.5).clamp(0, 1) * 255
            return pixels.round().to(torch.uint8).permute(1, 2, 0).cpu().contiguous()

    def image_condition(self, image: Path, last: Path | None, size: tuple[int, int], frame_num: int) -> Tensor:
        """What I2V pipelines put beside the noise: 4 mask channels and the latents of a video, [20, f, h, w].

        The video is the picture, then black, then `last` where there is one; `size` is (width, height).
        """
        import torch

        video = torch.zeros(3, frame_num, size[1], size[0])
        video[:, 0] = read_image(image, size)
        if last is not None:
            video[:, -1] = read_image(last, size)
        latents = self.encode(video)
        mask = torch.zeros(frame_num, *latents.shape[-2:])
        mask[0] = 1
        if last is not None:
            mask[-1] = 1
        mask = torch.cat([mask[:1].repeat_interleave(4, dim=0), mask[1:]])  # the first frame has a latent of its own
        mask = mask.view(latents.shape[1], 4, *latents.shape[-2:]).transpose(0, 1)
        return torch.cat([mask, latents])

    def first_frame(self, image: Path, size: tuple[int, int]) -> Tensor:
        """TI2V: the clean latents of the picture that the video starts with, [48, 1, h, w]."""
        return self.encode(read_image(image, size)[:, None])

    def close(self) -> None:
        """Let go of the weights."""
        self._vae = None
        _release(self.device)

    def __enter__(self) -> LatentCodec:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# --- loading and letting go -------------------------------------------------------------------------------------------


def _loaded(folder: Path, load: Callable[[], Any]) -> Any:
    """Call a library's loader without its progress bars. Raises UsageError that names the folder and its reason."""
    safetensors = require("safetensors", "loading")
    try:
        with _quiet("diffusers"), _no_bars():
            return load()
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"{folder}: cannot be loaded ({reason}); download this folder again") from error


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _no_bars() -> Iterator[None]:
    bars = require("transformers", "loading").utils.logging
    before = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            bars.enable_progress_bar()


def _release(device: torch.device) -> None:
    """Give back what the caller no longer names: hooks hold models in cycles, accelerators keep freed memory."""
    import torch

    gc.collect()
    empty = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty is not None:
        empty()
