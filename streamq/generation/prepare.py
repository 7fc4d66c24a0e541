"""Before a video is made: what the user asked for, whether it fits the model, and what is there already.

Headers and small files only; creates nothing. Needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streamq import hub, outputs, wan
from streamq.calibration.encoders import Parts, find_parts
from streamq.calibration.settings import Prompt
from streamq.checkpoint import load_json, open_checkpoint
from streamq.device import kind_of
from streamq.errors import QuantizedError, UsageError
from streamq.generation import folder
from streamq.generation.layers import Weights, float_weights, identity, quantized_weights
from streamq.generation.settings import DTYPES, Figures, GenerateSettings, figures_of, stem_of
from streamq.planner import check_paths
from streamq.savers.shard import sha256_of
from streamq.videos import Sidecar, read_sidecar
from streamq.wan.config import diffusers_config

MAX_CONFIG_BYTES = 4 << 20
HUB_FILES = ["*.json", "*.safetensors", "tokenizer/*", "image_processor/*"]
EXPERTS = ("high_noise_model", "low_noise_model")
IMAGE_FAMILIES = ("i2v", "flf2v")


@dataclass(frozen=True)
class Video:
    """One video to be made: `pair` as its sidecar will have it. `done`: it is there already."""

    prompt: Prompt
    seed: int
    sidecar: Path
    pair: dict[str, Any]
    done: bool


@dataclass(frozen=True)
class Job:
    """All that a run needs to know. weights: of one transformer, or of high and low noise."""

    settings: GenerateSettings
    figures: Figures
    parts: Parts
    pipeline: str
    boundary: float | None
    weights: tuple[Weights, ...]
    transformer: str
    identity: str
    videos: tuple[Video, ...]

    @property
    def family(self) -> str:
        """That of the transformer."""
        return self.weights[0].model.family


def prepare(settings: GenerateSettings) -> Job:
    """Find everything, and refuse what cannot be made. Raises UsageError."""
    _check_options(settings)
    source = hub.resolve(settings.model_path, download=True, wanted=HUB_FILES, unwanted=None)
    parts = find_parts(source)
    _check_parts(parts, source)
    assert parts.root is not None
    save_path = settings.save_path.expanduser()
    check_paths(parts.root, save_path)
    index = parts.model_index
    entry = index.get("transformer_2")
    two = isinstance(entry, list) and any(entry) or (parts.root / "transformer_2").is_dir()
    weights = _weights(settings, parts.root, two)
    for one in weights:
        if one.folder.resolve() == save_path.resolve():
            raise UsageError(f"--save_path {save_path}: the transformer's own folder; choose another")
    model, boundary = weights[0].model, index.get("boundary_ratio") if two else None
    if two and not isinstance(boundary, float):
        raise UsageError(f"{parts.root}/model_index.json: two experts, and no boundary_ratio; download it again")
    ratio = int(_json(_folder(parts.vae) / "config.json").get("scale_factor_spatial", 8))
    figures = figures_of(settings, model.family, len(weights), ratio)
    prompts = tuple(_with_images(_prompt(one), settings) for one in settings.prompts)
    for prompt in prompts:
        _check_images(prompt, weights[0])
    made_by, name = identity(list(weights)), _name(settings, parts.root)
    shared = _shared(settings, figures, parts, boundary)
    videos = tuple(
        _video(settings, save_path / f"{stem_of(i, seed)}.json", prompt, seed, shared | _own(prompt, seed), made_by)
        for i, prompt in enumerate(prompts) for seed in settings.seeds
    )  # fmt: skip
    images = model.family in IMAGE_FAMILIES or model.family == "ti2v" and prompts[0].image is not None
    kind = "WanImageToVideoPipeline" if images else "WanPipeline"
    kind = "WanVACEPipeline" if model.family == "vace" else kind
    return Job(settings, figures, parts, kind, boundary, weights, name, made_by, videos)


def _check_options(settings: GenerateSettings) -> None:
    if not settings.prompts:
        raise UsageError("no prompt: give --prompt TEXT or --prompts FILE")
    if not settings.seeds or len(set(settings.seeds)) != len(settings.seeds):
        raise UsageError(f"--seeds {','.join(map(str, settings.seeds))}: one or more, none of them twice")
    for seed in settings.seeds:
        if not 0 <= seed < 1 << 63:
            raise UsageError(f"--seed {seed}: from 0 to 2^63 - 1")
    if settings.dtype not in DTYPES:
        raise UsageError(f"--dtype {settings.dtype}: one of {', '.join(DTYPES)}")
    for option, path in (("image", settings.image), ("last_image", settings.last_image)):
        if path is not None and not path.expanduser().is_file():
            raise UsageError(f"--{option} {path}: no such file")
    kind_of(settings.device)


def _check_parts(parts: Parts, source: Path) -> None:
    names = ("text_encoder", "tokenizer", "vae")
    if parts.root is None:
        raise UsageError(
            f"{source}: a transformer alone makes no video; it takes a diffusers pipeline's folder with"
            f" model_index.json, {', '.join(f'{name}/' for name in names)} and scheduler/: give that as --model_path,"
            " and the transformer as --transformer"
        )
    lacks = [name for name in names if getattr(parts, name) is None] + ["scheduler"] * (not parts.scheduler)
    if lacks or not parts.model_index:
        lacking = [f"{name}/" for name in lacks] + ["model_index.json"] * (not parts.model_index)
        raise UsageError(f"{parts.root}: has no {', '.join(lacking)}, without which no video is made; download it")


def _json(path: Path) -> dict[str, Any]:
    document = load_json(path, MAX_CONFIG_BYTES)
    if not isinstance(document, dict):
        raise UsageError(f"{path}: not a JSON object; download it again")
    return document


def _folder(path: Path | None) -> Path:
    assert path is not None
    return path


# -- The transformer ---------------------------------------------------------------------------------------------------


def _weights(settings: GenerateSettings, root: Path, two: bool) -> tuple[Weights, ...]:
    """Of each expert: what the options say, and the pipeline's own float weights where they say nothing."""
    if settings.transformer_2 is not None and not two:
        raise UsageError(f"--transformer_2 {settings.transformer_2}: {root} has one expert; leave it out")
    names = EXPERTS if two else ("",)
    given: dict[str, Weights] = {}
    for option, path, wanted in (
        ("transformer", settings.transformer, names), ("transformer_2", settings.transformer_2, names[1:])
    ):  # fmt: skip
        if path is not None:
            given |= _open(option, path.expanduser(), wanted, root)
    if len(given) < len(names):
        own = {expert.name: expert for expert in wan.open_model(root)}
        given |= {name: float_weights(own[name]) for name in names if name not in given}
    found = tuple(given[name] for name in names)
    for name, one in zip(names, found, strict=True):
        _check_fits(one, root / ("transformer_2" if name == EXPERTS[1] else "transformer"), found[0])
    return found


def _open(option: str, path: Path, wanted: tuple[str, ...], root: Path) -> dict[str, Weights]:
    """Expert -> its weights, of a quantized folder or a float one."""
    if not path.exists():
        raise UsageError(f"--{option} {path}: no such folder")
    above = folder.manifest_above(path)
    if above is not None:
        folder.check_files(option, path, *above)
    found = outputs.find_outputs(path)
    formats = sorted({one.format_name for one in found})
    if len(formats) > 1:
        raise UsageError(f"--{option} {path}: holds {', '.join(formats)}; give one of them, {path / formats[0]}")
    for place in {path, *(one.folder for one in found)}:
        folder.check_config(place)
    if not found and above is not None:
        raise folder.unknown(option, path, *above)
    if not found:
        experts = _float(option, path)
        if len(experts) == 2 and len(wanted) == 2:
            return {expert.name: float_weights(expert) for expert in experts}
        if len(experts) == 1:
            return {wanted[0]: float_weights(experts[0])}
        raise UsageError(f"--{option} {path}: two experts, where one is wanted; give one's folder")
    for one in found:
        folder.check_index(one.folder, one.checkpoint())
    manifest = above[0] if above is not None else path
    config = {EXPERTS[1]: root / "transformer_2"}
    by_name = {one.expert: one for one in found}
    if "" in by_name:
        name = wanted[0]
        return {name: quantized_weights(by_name[""], manifest, config.get(name, root / "transformer"))}
    if not set(wanted) & by_name.keys():
        raise UsageError(f"--{option} {path}: holds {', '.join(by_name)}, and this pipeline takes one transformer")
    return {
        name: quantized_weights(by_name[name], manifest, config.get(name, root / "transformer"))
        for name in wanted if name in by_name
    }  # fmt: skip


def _float(option: str, path: Path) -> list[wan.Expert]:
    try:
        return wan.open_model(path)
    except QuantizedError as error:
        if (path / "config.json").is_file():
            raise
        raise UsageError(
            f"--{option} {path}: quantized, in a format that cannot be told without its config.json, which is missing;"
            f" {outputs.anew(path)}"
        ) from error


def _check_fits(weights: Weights, own: Path, first: Weights) -> None:
    """Raise UsageError for a transformer of another model than the pipeline's, by its own transformer's config."""
    if weights.model.family != first.model.family:
        raise UsageError(
            f"{weights.folder}: a {weights.model.family} transformer beside {first.folder}, a {first.model.family} one"
        )
    if not (own / "config.json").is_file():
        return
    due, given = _json(own / "config.json"), diffusers_config(weights.model)
    keys = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "text_dim",
            "ffn_dim", "image_dim")  # fmt: skip
    for key in keys:
        if key in due and due[key] != given[key]:
            raise UsageError(
                f"{weights.folder}: {key} is {given[key]}, the pipeline's {own.name} has {due[key]}: another model's"
                " transformer; give the pipeline that it was made from"
            )


def _name(settings: GenerateSettings, root: Path) -> str:
    """The transformer as the sidecar names it: folders' names, no paths."""
    given = [path for path in (settings.transformer, settings.transformer_2) if path is not None]
    return " + ".join(path.expanduser().absolute().name for path in given) or f"{root.absolute().name}/transformer"


# -- Prompts and what a pair shares ------------------------------------------------------------------------------------


def _prompt(given: str | Prompt) -> Prompt:
    return Prompt(given) if isinstance(given, str) else given


def _with_images(prompt: Prompt, settings: GenerateSettings) -> Prompt:
    image, last = prompt.image or settings.image, prompt.last_image or settings.last_image
    return replace(
        prompt, negative=prompt.negative or settings.negative_prompt,
        image=image and image.expanduser(), last_image=last and last.expanduser(),
    )  # fmt: skip


def _check_images(prompt: Prompt, weights: Weights) -> None:
    model, shown = weights.model, prompt.text[:60]
    branch = "blocks.0.attn2.add_k_proj.weight" in model.tensors
    if model.family in IMAGE_FAMILIES and prompt.image is None:
        raise UsageError(f"a {model.family} model starts from a picture: give --image (prompt {shown!r} has none)")
    if model.family == "flf2v" and prompt.last_image is None:
        raise UsageError(f"a flf2v model ends with a picture, too: give --last_image (prompt {shown!r} has none)")
    if model.family == "t2v" and prompt.image is not None:
        raise UsageError(f"--image {prompt.image}: a t2v model takes none; leave it out, or take an i2v model")
    takes_last = model.family == "flf2v" or model.family == "i2v" and not branch
    if prompt.last_image is not None and not takes_last:
        raise UsageError(f"--last_image {prompt.last_image}: this {model.family} model takes none; leave it out")


def _shared(
    settings: GenerateSettings, figures: Figures, parts: Parts, boundary: float | None
) -> dict[str, Any]:  # fmt: skip
    """What all videos of a run share, of what a pair must share."""
    scheduler = parts.scheduler
    shift = figures.shift if figures.shift is not None else scheduler.get("flow_shift", scheduler.get("shift"))
    return {
        "width": figures.size[0], "height": figures.size[1], "frame_num": figures.frame_num, "fps": figures.fps,
        "steps": figures.steps, "guidance": figures.guidance, "guidance_2": figures.guidance_2, "shift": shift,
        "scheduler": scheduler.get("_class_name"), "compute_dtype": DTYPES[settings.dtype],
        "text_encoder": _part_hash(parts.text_encoder), "vae": _part_hash(parts.vae),
        "image_encoder": _part_hash(parts.image_encoder), "boundary": boundary,
        "device_kind": kind_of(settings.device),
    }  # fmt: skip


def _part_hash(folder: Path | None) -> str | None:
    """sha256 of a part's safetensors headers and sizes."""
    if folder is None:
        return None
    files = [[file.name, file.size, file.header_sha256] for file in open_checkpoint(folder).files]
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _own(prompt: Prompt, seed: int) -> dict[str, Any]:
    """What is a video's own of it."""
    image, last = (path and sha256_of(path) for path in (prompt.image, prompt.last_image))
    return {
        "prompt": prompt.text, "negative_prompt": prompt.negative, "seed": seed, "image": image, "last_image": last
    }  # fmt: skip


def _video(
    settings: GenerateSettings, sidecar: Path, prompt: Prompt, seed: int, pair: dict[str, Any], made_by: str
) -> Video:  # fmt: skip
    """With `done`, where the same video is there. Raises UsageError where another one is, without overwrite."""
    if not sidecar.is_file():
        return Video(prompt, seed, sidecar, pair, False)
    try:
        why = _difference(read_sidecar(sidecar), pair, made_by)
    except UsageError:
        if not settings.overwrite:
            raise
        why = "cannot be read"
    if why is not None and settings.overwrite:
        return Video(prompt, seed, sidecar, pair, False)
    if why is not None:
        raise UsageError(f"{sidecar}: another video is there: {why}; --overwrite replaces it, or choose a --save_path")
    return Video(prompt, seed, sidecar, pair, True)


def _difference(found: Sidecar, pair: dict[str, Any], made_by: str) -> str | None:
    """In what it differs, or None."""
    for key, value in pair.items():
        if found.pair.get(key) != value:
            return f"{key} is {str(found.pair.get(key))[:80]}, asked for is {str(value)[:80]}"
    return None if found.made.get("transformer_sha256") == made_by else "made with another transformer"
