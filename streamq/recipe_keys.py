"""The words of a recipe as tables: kinds of steps, their keys, what each may be. `streamq.recipe` reads by them."""

from __future__ import annotations

from typing import Any

SAVERS = {f"{name}_format_saver": name for name in ("mindie", "lightx2v", "nunchaku", "diffusers", "comfyui", "gguf")}
PROCESS_KINDS = {
    "linear_quant": {"type", "qconfig", "include", "exclude", "overrides"},
    "smooth_quant": {"type", "method", "alpha", "scale_min", "symmetric", "grid", "rows", "include", "exclude"},
    "iter_smooth": {"type", "method", "alpha", "scale_min", "symmetric", "include", "exclude", "enable_subgraph_type"},
    "online_quarot": {"type", "block_size", "include", "exclude"},
    "fa3_quant": {"type", "qconfig", "include", "exclude"},
}
SMOOTH_ALPHA = {"smooth_quant": 0.5, "iter_smooth": 0.9}  # msModelSlim's defaults
SMOOTH_METHODS = ("smoothquant", "awq", "svdquant")
GRIDS = ("full", "coarse")
SEARCH_ROWS = (256, 1, 1 << 20)  # default, least, most: rows of the input by which a candidate is judged
SUBGRAPHS = ("norm-linear", "linear-linear", "ov", "up-down")
# Steps of msModelSlim that are not read here -> what does the like.
PEER_KINDS = {
    "awq": "smooth_quant with method awq does the like",
    "flex_smooth_quant": "smooth_quant with alpha search does the like",
    "flex_awq_ssz": "smooth_quant with method awq, and linear_quant with weight method mse, do the like",
    "quarot": "it rotates language models; online_quarot rotates attention",
    "svd_res": "mindiesd reads no SVD type; linear_quant with weight method svdquant is for nunchaku",
    "flatquant": "",
    "autoround_quant": "linear_quant with weight method gptq does the like",
    "kv_smooth": "a video transformer keeps no KV cache",
    "float_sparse": "no runtime here is sparse",
    "adapt_rotation": "",
    "group": "list the steps one by one",
    "module_func": "",
}
# dtype of attention -> the scope that MindIE's kernels have it in.
FA3_SCOPES = {"fp8_e4m3": "per_token", "mxfp4": "per_block"}
AXES = (-1, 1, [-1], [1])  # of a weight [out, in]: its inputs
QCONFIG_VALUES: dict[str, tuple[str, ...]] = {
    "act.scope": ("per_token", "per_tensor", "per_block", "per_group"),
    "act.dtype": ("int8", "fp8_e4m3", "int4", "nvfp4", "mxfp8", "mxfp4", "float"),
    "act.method": ("minmax", "percentile", "mse", "none"),
    "weight.scope": ("per_channel", "per_tensor", "per_block", "per_group"),
    "weight.dtype": ("int8", "fp8_e4m3", "int4", "nvfp4", "mxfp8", "mxfp4"),
    "weight.method": ("minmax", "mse", "gptq", "svdquant", "mse_round", "ceil_x"),
}
# operand.method -> the keys of its `ext`, with the least and the most that each may be (bool and text: the values).
EXT_KEYS: dict[str, dict[str, tuple[Any, ...]]] = {  # fmt: skip
    "act.minmax": {"axes": AXES},
    "act.percentile": {"percentile": (50.0, 100.0)},
    "weight.gptq": {
        "act_order": (False, True),
        "damping": (1e-6, 1.0),
        "block": (1, 4096),
        "scales": ("minmax", "mse"),
        "weighted": (False, True),
    },
    "weight.ceil_x": {
        "axes": AXES,
        "ceil_x_value": (6.0, 12.0),
        "enable_search": (False, True),
        "search_min": (6.0, 12.0),
        "search_max": (6.0, 12.0),
        "search_step": (0.01, 6.0),
    },
    "weight.minmax": {"convrot": (16, 256), "axes": AXES},
    "weight.mse": {"weighted": (False, True)},
    "weight.mse_round": {"axes": AXES},
    "weight.svdquant": {
        "rank": (16, 1024),
        "rounds": (1, 1000),
        "svd": ("auto", "exact", "randomised"),
        "gptq": (False, True),
        "act_order": (False, True),
        "damping": (1e-6, 1.0),
    },
}
NEXT_INPUTS = ("float", "quantized")
CALIBRATION_RANGES: dict[str, tuple[Any, Any]] = {
    "rows": (1, 1 << 20), "gram_rows": (0, 1 << 30), "num_samples": (1, 1 << 20), "time_bins": (1, 1000),
    "frame_num": (1, 10_000), "sample_steps": (1, 1000), "shift": (0.01, 1000.0), "guidance": (0.0, 1000.0),
}  # fmt: skip
CALIBRATION_TEXTS = ("size", "dtype", "next_input")
_INTS = (
    "frame_num sample_steps base_seed cfg_size ulysses_size ring_size tp_size attentioncache_interval start_step"
    " end_step sparse_start_step"
)
_FLOATS = "sample_shift attentioncache_ratio sparsity"
_BOOLS = (
    "offload_model convert_model_dtype vae_parallel t5_fsdp t5_cpu dit_fsdp use_prompt_extend use_attentioncache"
    " use_rainfusion"
)
_TEXTS = (
    "prompt size task image sample_solver ckpt_dir save_file quant_dit_path prompt_extend_method prompt_extend_model"
    " prompt_extend_target_lang"
)
MODEL_CONFIG_KEYS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_INTS.split(), (int,)),
    **dict.fromkeys(_FLOATS.split(), (int, float)),
    **dict.fromkeys(_BOOLS.split(), (bool,)),
    **dict.fromkeys(_TEXTS.split(), (str,)),
    "sample_guide_scale": (int, float, list),
}
