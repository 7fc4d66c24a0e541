"""Write a synthetic Wan checkpoint of any family, layout and size, in a few MiB of memory. For demo, tests, benchmarks.

    python benchmarks/synthetic.py --family t2v-1.3B --out DIR                  5.7 GB, fp32, native names
    python benchmarks/synthetic.py --family i2v-14B --tiny --layout diffusers --out DIR

Names and shapes are the releases'; values are Gaussian with a spread per output channel and a few hot input channels,
seeded by name, so that every layout of one seed holds the same weights. Not for judging quality.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from streamq import wan
from streamq.savers import Spec
from streamq.savers.shard import layout as file_layout

CHUNK = 1 << 20  # elements made at a time
DTYPES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}


@dataclass(frozen=True)
class Family:
    """Sizes of one release. `vace_layers`: number of VACE blocks."""

    dim: int
    ffn: int
    blocks: int
    channels_in: int = 16
    channels_out: int = 16
    image_tokens: int = 0  # 257: an image branch; 514: first and last frame
    vace_blocks: int = 0
    experts: int = 1
    extra: tuple[str, ...] = ()  # native names of further [dim, dim] tensors
    heads: int = 0
    text_dim: int = 4096
    image_dim: int = 1280


_14B = Family(5120, 13824, 40)
_1B = Family(1536, 8960, 30)
FAMILIES = {
    "t2v-1.3B": _1B,
    "t2v-14B": _14B,
    "i2v-14B": replace(_14B, channels_in=36, image_tokens=257),
    "flf2v-14B": replace(_14B, channels_in=36, image_tokens=514),
    "vace-1.3B": replace(_1B, vace_blocks=15),
    "vace-14B": replace(_14B, vace_blocks=8),
    "t2v-A14B": replace(_14B, experts=2),
    "i2v-A14B": replace(_14B, channels_in=36, experts=2),
    "ti2v-5B": Family(3072, 14336, 30, 48, 48),
    "s2v-14B": replace(
        _14B, extra=("audio_injector.injector.0.q.weight", "casual_audio_encoder.encoder.final_linear.weight")
    ),
    "animate-14B": replace(
        _14B, channels_in=36, image_tokens=257, extra=("face_adapter.fuser_blocks.0.linear1_q.weight",)
    ),
}


def tiny(family: Family, blocks: int = 2) -> Family:
    """The same structure at width 64."""
    return replace(
        family,
        dim=64,
        ffn=128,
        blocks=blocks,
        vace_blocks=min(family.vace_blocks, 2),
        heads=2,
        text_dim=64,
        image_dim=64,
    )


def shapes(f: Family) -> dict[str, tuple[int, ...]]:
    """Native name -> shape."""
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (rows, columns), (rows,)

    def block(name: str) -> None:
        found[f"{name}.modulation"] = (1, 6, f.dim)
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{name}.{attention}.{part}", f.dim, f.dim)
            for norm in ("norm_q", "norm_k"):
                found[f"{name}.{attention}.{norm}.weight"] = (f.dim,)
        found[f"{name}.norm3.weight"], found[f"{name}.norm3.bias"] = (f.dim,), (f.dim,)
        linear(f"{name}.ffn.0", f.ffn, f.dim)
        linear(f"{name}.ffn.2", f.dim, f.ffn)

    def patch(name: str, channels: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (f.dim, channels, 1, 2, 2), (f.dim,)

    patch("patch_embedding", f.channels_in)
    linear("text_embedding.0", f.dim, f.text_dim)
    linear("text_embedding.2", f.dim, f.dim)
    linear("time_embedding.0", f.dim, 256)
    linear("time_embedding.2", f.dim, f.dim)
    linear("time_projection.1", 6 * f.dim, f.dim)
    for i in range(f.blocks):
        block(f"blocks.{i}")
        if f.image_tokens:
            linear(f"blocks.{i}.cross_attn.k_img", f.dim, f.dim)
            linear(f"blocks.{i}.cross_attn.v_img", f.dim, f.dim)
            found[f"blocks.{i}.cross_attn.norm_k_img.weight"] = (f.dim,)
    found["head.modulation"] = (1, 2, f.dim)
    linear("head.head", 4 * f.channels_out, f.dim)
    if f.image_tokens:
        if f.image_tokens == 514:
            found["img_emb.emb_pos"] = (1, 514, f.image_dim)
        for i, width in ((0, f.image_dim), (4, f.dim)):
            found[f"img_emb.proj.{i}.weight"], found[f"img_emb.proj.{i}.bias"] = (width,), (width,)
        linear("img_emb.proj.1", f.image_dim, f.image_dim)
        linear("img_emb.proj.3", f.dim, f.image_dim)
    for i in range(f.vace_blocks):
        block(f"vace_blocks.{i}")
        if i == 0:
            linear("vace_blocks.0.before_proj", f.dim, f.dim)
        linear(f"vace_blocks.{i}.after_proj", f.dim, f.dim)
    if f.vace_blocks:
        patch("vace_patch_embedding", 96)
    return found | {name: (f.dim, f.dim) for name in f.extra}


def values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
    """The tensor's float32 values, in row chunks."""
    columns = int(np.prod(shape[1:])) if len(shape) > 1 else 1
    rows = int(np.prod(shape)) // columns
    hot = np.random.default_rng(seed + columns).choice(columns, max(1, columns // 1024), replace=False)
    for start in range(0, rows, max(1, CHUNK // columns)):
        count = min(max(1, CHUNK // columns), rows - start)
        rng = np.random.Generator(np.random.SFC64(zlib.crc32(f"{seed}:{name}:{start}".encode())))
        block = rng.standard_normal((count, columns), dtype=np.float32)
        if len(shape) == 2:
            block *= np.exp(0.25 * rng.standard_normal((count, 1), dtype=np.float32)) * np.float32(0.7 / columns**0.5)
            block[:, hot] *= 5
        yield (block * np.float32(0.1) + np.float32("norm" in name)) if len(shape) == 1 else block


def encode(block: np.ndarray, dtype: str) -> bytes:
    """float32 -> the stored dtype; bf16 rounds to nearest even."""
    if dtype == "BF16":
        bits = block.view(np.uint32)
        return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16).tobytes()
    return block.astype(np.float16 if dtype == "F16" else np.float32).tobytes()


def write(
    out: Path, family: Family, *, layout: str = "native", dtype: str = "fp32", seed: int = 0, prefix: str = "",
    shard_bytes: int = 0, single_file: str = "", sparse: bool = False,
) -> None:  # fmt: skip
    """Write the checkpoint: files, index, config; in the folders in which a release of this layout has them.

    `sparse`: real headers, data left as holes, so that a full-size model takes no room.
    """
    folders = {"native": ["high_noise_model", "low_noise_model"], "diffusers": ["transformer", "transformer_2"]}[layout]
    if family.experts == 1:
        folders = folders[:1] if layout == "diffusers" and not single_file else [""]
    for expert, folder in enumerate(folders):
        where = out / folder
        where.mkdir(parents=True, exist_ok=True)
        _write_expert(
            where, family, layout, DTYPES[dtype], seed + 1000 * expert, prefix, shard_bytes, single_file, sparse
        )
        if not single_file:
            (where / "config.json").write_text(json.dumps(_config(family, layout), indent=2) + "\n")
    if layout == "diffusers" and not single_file:
        entry = ["diffusers", "WanTransformer3DModel"]
        index = {
            "_class_name": "WanPipeline",
            "transformer": entry,
            "transformer_2": entry if family.experts == 2 else [None, None],
        }
        (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def _write_expert(
    where: Path, family: Family, layout: str, dtype: str, seed: int, prefix: str, shard_bytes: int, single_file: str,
    sparse: bool,
) -> None:  # fmt: skip
    shards: list[list[tuple[str, Spec]]] = [[]]
    room = shard_bytes
    for native, shape in sorted(shapes(family).items()):
        name = prefix + (native if layout == "native" else wan.to_diffusers(native) or native)
        size = int(np.prod(shape)) * (4 if dtype == "F32" else 2)
        if shard_bytes and size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((native, Spec(name, dtype, shape, "")))
        room -= size
    stem, count, where_is = "diffusion_pytorch_model", len(shards), {}
    for number, shard in enumerate(shards, 1):
        name = single_file or (
            f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors"
        )
        file, _ = file_layout(name, 0, [spec for _, spec in shard], 0o644)
        with open(where / name, "wb") as stream:
            stream.write(file.header)
            if sparse:
                stream.truncate(file.size)
            for native, spec in shard:
                where_is[spec.name] = name
                for block in () if sparse else values(native, spec.shape, seed):
                    stream.write(encode(block, dtype))
    if count > 1:
        (where / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": where_is}, indent=2)
        )


def _config(f: Family, layout: str) -> dict[str, object]:
    heads = f.heads or f.dim // 128
    if layout == "diffusers":
        return {
            "_class_name": "WanTransformer3DModel", "num_attention_heads": heads, "attention_head_dim": f.dim // heads,
            "in_channels": f.channels_in, "out_channels": f.channels_out, "ffn_dim": f.ffn, "num_layers": f.blocks,
            "text_dim": f.text_dim, "freq_dim": 256, "eps": 1e-6, "patch_size": [1, 2, 2], "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
            "image_dim": f.image_dim if f.image_tokens else None,
            "added_kv_proj_dim": f.dim if f.image_tokens else None,
            "pos_embed_seq_len": 514 if f.image_tokens == 514 else None,
        }  # fmt: skip
    return {
        "_class_name": "WanModel", "_diffusers_version": "0.33.0", "dim": f.dim, "eps": 1e-06, "ffn_dim": f.ffn,
        "freq_dim": 256, "in_dim": f.channels_in, "model_type": "i2v" if f.image_tokens else "t2v", "num_heads": heads,
        "num_layers": f.blocks, "out_dim": f.channels_out, "text_len": 512,
    }  # fmt: skip


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=FAMILIES)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--layout", default="native", choices=["native", "diffusers"])
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="width 64")
    parser.add_argument("--blocks", type=int, help="number of blocks, instead of the family's")
    parser.add_argument("--prefix", default="")
    parser.add_argument("--shard_bytes", type=float, default=0)
    parser.add_argument("--single_file", default="")
    parser.add_argument("--sparse", action="store_true", help="real headers, no data")
    args = parser.parse_args()
    family = tiny(FAMILIES[args.family]) if args.tiny else FAMILIES[args.family]
    family = replace(family, blocks=args.blocks or family.blocks)
    write(args.out, family, layout=args.layout, dtype=args.dtype, seed=args.seed, prefix=args.prefix,
          shard_bytes=int(args.shard_bytes), single_file=args.single_file, sparse=args.sparse)  # fmt: skip
    print(f"{args.out}: {sum(p.stat().st_size for p in args.out.rglob('*.safetensors')):,} bytes")


if __name__ == "__main__":
    main()
