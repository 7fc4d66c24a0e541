"""The command line: options to one frozen dataclass a command, exit codes, and nothing else.

Exit status: 0 done, 1 the work failed, 2 wrong use (nothing written), 130 interrupted. An error is one line on stderr
that begins with `error: `. Torch is imported only once there is work for it.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from streamq import __version__, preview, ranks
from streamq.errors import StreamqError, UsageError, nearest, out_of_memory
from streamq.options import QuantOptions, given_size, parse_lora

if TYPE_CHECKING:
    from streamq.calibration.prepare import CalibJob
    from streamq.calibration.store import CalibSet
    from streamq.plan import Plan

# Command -> its package, whose `command` module has its options, and what it is for.
VIDEO_COMMANDS = {
    "generate": ("generation", "make videos with a float or a quantized model, its transformer streamed"),
    "eval": ("evaluation", "compare videos pair by pair: float and quantized, same prompt and seed"),
    "analyze": ("analysis", "how much each layer and block loses by type, and a recipe that follows from it"),
}


# What torchao says when diffusers imports it, and diffusers of it, is nothing that a user could act on.
CHATTY = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao")


class _Parser(argparse.ArgumentParser):
    """argparse that raises instead of exiting, with our wording and the nearest option."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        commands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for action in commands for parser in action.choices.values())]
        known = tuple({option for parser in parsers for a in parser._actions for option in a.option_strings})
        hint = nearest(unknown[1].partition("=")[0], known) if unknown else ""
        raise UsageError(f"{message}{hint}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="streamq", description="Quantize Wan video transformers, one block at a time.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"streamq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    for name, text in (
        ("quant", "quantize a model"),
        ("plan", "say what quant would do, exactly, without doing it; reads headers only"),
    ):
        _add_quant_options(commands.add_parser(name, help=text, description=text, allow_abbrev=False))
    text = "make cached calibration inputs"
    _add_calib_options(commands.add_parser("calib", help=text, description=text, allow_abbrev=False))
    inspect = commands.add_parser("inspect", help="what a checkpoint or a quantized folder is", allow_abbrev=False)
    inspect.add_argument("path")
    verify = commands.add_parser("verify", help="check a quantized folder, offline", allow_abbrev=False)
    verify.add_argument("save_path", type=Path)
    verify.add_argument(
        "--source", metavar="MODEL_PATH", help="compare every layer with the float model it was made from"
    )
    _add_lora_option(verify, "merged into --source before it is compared, as given to quant")
    recipes = commands.add_parser("recipes", help="list the library's recipes, or print one", allow_abbrev=False)
    recipes.add_argument("name", nargs="?")
    for command in (inspect, verify, recipes):
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
        command.add_argument("--debug", action="store_true", help="show tracebacks")
    for name, about in VIDEO_COMMANDS.items():
        _video_command(name).add_options(commands.add_parser(name, help=about[1], allow_abbrev=False))
    return parser


def _video_command(name: str) -> Any:
    return importlib.import_module(f"streamq.{VIDEO_COMMANDS[name][0]}.command")


def _add_quant_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_path", required=True, help="folder, .safetensors file or hub id")
    add("--save_path", required=True, type=Path, help="output folder")
    add("--model_type", help="Wan2_1, Wan2_2, …; left out: read off the tensors")
    add("--quant_type", help="a type of the library: streamq recipes")
    add("--config_path", type=Path, help="a recipe YAML, instead of --quant_type")
    add(
        "--format",
        action="append",
        default=[],
        help="mindie, lightx2v, nunchaku, diffusers, comfyui, gguf (default: the type's first); several,"
        " comma-separated, from one read",
    )
    add(
        "--layout",
        default="block",
        choices=["block", "single", "plain", "prefixed"],
        help="files of lightx2v (default block); nunchaku: single is its older container; comfyui: names (plain)",
    )
    add("--device", default="auto", help="auto, cpu, cuda[:i], npu[:i]")
    add("--resume", action="store_true", default=True, help="go on where an interrupted run stopped (default)")
    add("--no_resume", action="store_false", dest="resume", help="start an interrupted run anew")
    add("--overwrite", action="store_true", help="discard what is in SAVE_PATH")
    add("--max_shard_size", metavar="SIZE", help="e.g. 5GB; mindie then writes shards; nunchaku: of 10GB unless said")
    add("--max_host_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--max_device_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--calib", type=Path, help="calibration inputs made by streamq calib; without it a recipe makes its own")
    _add_lora_option(parser, "merged into the weights before they are quantized; EXPERT: high_noise_model or low_…")
    preview.add_options(parser)
    add("--match", help="msmodelslim or lightx2v: that tool's arithmetic, byte for byte (default: fp32)")
    add(
        "--read_ahead",
        type=int,
        default=1,
        metavar="N",
        help="layers read ahead and written behind; 0: one thread (default 1)",
    )
    add("--trust_remote_code", choices=["True", "False"], default="False", help="accepted; no code is ever run")
    add("--seed", type=int, default=0, help="of the calibration inputs that the run makes")
    add("--quiet", action="store_true", help="no progress")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--debug", action="store_true", help="show tracebacks")


def _add_lora_option(parser: argparse.ArgumentParser, text: str) -> None:
    given = "[EXPERT=]PATH[:STRENGTH]"
    parser.add_argument("--lora", action="append", default=[], metavar=given, help=f"{text}; may be repeated")


def _add_calib_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model_path", required=True, help="folder, .safetensors file or hub id; a diffusers pipeline's is best")
    add("--save_path", required=True, type=Path, help="output folder")
    add("--model_type", help="Wan2_1, Wan2_2, …; left out: read off the tensors")
    add("--mode", help="interpolate (default): noise mixed into latents; trajectory: the model's own denoising; dump")
    add("--prompts", type=Path, metavar="FILE", help="a prompt a line, or .jsonl with text, image, negative_prompt")
    add("--prompt", action="append", default=[], metavar="TEXT", help="instead of a file; may be given several times")
    add("--videos", type=Path, metavar="DIR", help="clips whose latents are used, through the pipeline's VAE")
    add("--latents", type=Path, metavar="FILE", help="latents instead of clips, .safetensors")
    add("--text_embeds", type=Path, metavar="FILE", help="text states instead of prompts, .safetensors")
    add("--dump", type=Path, metavar="PATH", help="another tool's dump: msModelSlim's .pth, deepcompressor's folder")
    add("--num_samples", type=int, metavar="N", help="for each expert (default 32)")
    add("--size", metavar="W*H", help="of the video in pixels, e.g. 832*480 (default 448*256)")
    add("--frame_num", type=int, metavar="N", help="frames, 4n + 1 (default 9)")
    add("--sample_steps", type=int, metavar="N", help="steps of the schedule (default: the model's)")
    add("--time_bins", type=int, metavar="N", help="parts of an expert's steps to spread samples over (default 8)")
    add("--guidance", type=float, help="of a trajectory (default: the model's)")
    add("--shift", type=float, help="of the schedule (default: the pipeline's, or the model's)")
    add("--dtype", choices=["bf16", "fp32"], default="bf16", help="to compute in (default bf16)")
    add("--device", default="auto", help="auto, cpu, cuda[:i], npu[:i]")
    add("--overwrite", action="store_true", help="discard the set that is in SAVE_PATH")
    add("--max_host_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--max_device_memory", metavar="SIZE", help="budget, e.g. 4GiB")
    add("--seed", type=int, default=0)
    add("--quiet", action="store_true", help="no cost, no progress")
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--debug", action="store_true", help="show tracebacks")


def _options(args: argparse.Namespace) -> QuantOptions:
    formats = tuple(dict.fromkeys(name.strip() for given in args.format for name in given.split(",")))
    if args.read_ahead < 0 or args.read_ahead > 64:
        raise UsageError(f"--read_ahead {args.read_ahead}: a number of layers from 0 to 64")
    return QuantOptions(
        model_path=args.model_path, save_path=args.save_path.expanduser(), model_type=args.model_type,
        quant_type=args.quant_type, config_path=args.config_path, formats=formats, layout=args.layout,
        device=args.device, resume=args.resume, overwrite=args.overwrite,
        max_shard_size=given_size(args, "max_shard_size") or 0,
        max_host_memory=given_size(args, "max_host_memory") or None,
        max_device_memory=given_size(args, "max_device_memory") or None,
        match=args.match, calib=args.calib, trust_remote_code=args.trust_remote_code == "True", seed=args.seed,
        lora=tuple(map(parse_lora, args.lora)), read_ahead=args.read_ahead, quiet=args.quiet,
        json=args.json, debug=args.debug,
    )  # fmt: skip


def _plan(args: argparse.Namespace) -> int:
    from streamq import cost, display
    from streamq.journal import discardable
    from streamq.plan import check_disk
    from streamq.planner import make_plan

    plan = make_plan(_options(args), download=False)
    check_disk(plan, freed=sum(path.lstat().st_size for path in discardable(plan.options.save_path)))
    if args.json:
        print(json.dumps(plan.to_json() | cost.to_json(plan), indent=1))
        return 0
    display.warn(plan.warnings)
    display.show_plan(plan)
    return 0


def _quant(args: argparse.Namespace) -> int:
    from streamq import display
    from streamq.journal import discardable
    from streamq.planner import make_plan

    options, peers = _options(args), args.ranks
    if args.preview and peers.count > 1:
        raise UsageError(f"--preview with {peers.count} processes: give it to streamq eval afterwards, in one")
    preview.check(args, options)
    plan = make_plan(options, download=True)
    doomed = sorted(path.name for path in discardable(options.save_path)) if options.overwrite else []
    if peers.first:
        if not options.quiet and not options.json:
            display.show_plan(plan)
        display.warn(plan.warnings)
        if doomed:
            display.warn([f"--overwrite discards {len(doomed)} files in {options.save_path}: {', '.join(doomed[:5])}"])
    figures = _run(plan, peers)
    if not peers.first:
        return 0
    if args.preview:
        figures["report"] = str(preview.show(args, options, [target.name for target in plan.targets]))
    if options.json:
        print(json.dumps(figures, indent=1))
    elif args.preview:
        print(f"compared with the float model: {figures['report']}")
    return 0


def _run(plan: Plan, peers: ranks.Ranks) -> dict[str, Any]:
    """What was done. Everything from here on needs torch."""
    from streamq import display

    torch = _import_torch()
    from streamq import pipeline
    from streamq.device import open_device

    options = plan.options
    device, began = open_device(peers.device(options.device)), time.monotonic()
    try:
        with display.Display(device, quiet=options.quiet) if peers.first else display.Silent() as watcher:
            if peers.count > 1:
                watcher.said(f"{peers.count} processes, budgets are for each")
            manifest = pipeline.run(plan, device, watcher, peers)
    except KeyboardInterrupt:
        how = "the same command resumes" if options.resume else "the same command without --no_resume resumes"
        raise KeyboardInterrupt(f"what is committed in {options.save_path} is kept, {how}") from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        advice = "committed blocks are kept: run the same command with --read_ahead 0, or a smaller budget"
        raise out_of_memory(error, f"{advice} (--max_host_memory, --max_device_memory)") from error
    if manifest is None:
        if not options.json and peers.first:
            print(f"already done: {options.save_path} is complete and intact")
        return {"status": "already done", "save_path": str(options.save_path), "plan": plan.hash}
    figures = display.summary(plan, manifest, device, time.monotonic() - began)
    if not options.json and not options.quiet and peers.first:
        display.show_summary(figures)
    return figures


def _calib(args: argparse.Namespace) -> int:
    from streamq import display
    from streamq.calibration import prepare

    settings = prepare.settings_of(args)
    budgets = given_size(args, "max_host_memory"), given_size(args, "max_device_memory")
    job = prepare.prepare(settings, args.model_path, args.model_type, args.save_path.expanduser(), args.device, budgets,
                          overwrite=args.overwrite)  # fmt: skip
    done = job.finished
    if done is None:
        if not args.quiet:
            display.show_calib_cost(job.outlook, settings)
        display.warn(job.warnings)
        done = _make_calib(args, job)
    figures = display.calib_summary(done, job.outlook, job.warnings, made=job.finished is None)
    if args.json:
        print(json.dumps(figures, indent=1))
    elif job.finished is not None or not args.quiet:
        print(f"{figures['status']}: {done.path}, {sum(figures['experts'].values())} samples")
    return 0


def _make_calib(args: argparse.Namespace, job: CalibJob) -> CalibSet:
    from streamq import display

    torch = _import_torch()
    from streamq.calibration import make
    from streamq.device import open_device

    device, save_path = open_device(args.device), job.save_path
    try:
        about = display.CalibProgress(quiet=args.quiet)
        return make.make_set(save_path, job.settings, job.experts, job.source, device, about=about)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{save_path} holds no complete set, the same command starts again") from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        advice = "give a smaller --size, --frame_num or, for a trajectory, --num_samples"
        raise out_of_memory(error, advice) from error


def _import_torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError as error:
        raise UsageError(
            f"no module {error.name}; `pip install torch`, or install streamq with its dependencies"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:
        raise UsageError(
            f"torch does not import ({' '.join(str(error).split())[:200]}); if torch_npu is installed without a working"
            " CANN, `source .../ascend-toolkit/set_env.sh`, or set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to work without it"
        ) from error
    return torch


def _inspect(args: argparse.Namespace) -> int:
    from streamq import outputs

    facts = outputs.inspect(args.path)
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        from streamq import display

        display.show_facts(facts)
    return 0


def _verify(args: argparse.Namespace) -> int:
    _import_torch()
    from streamq import display, verify

    report = verify.verify(args.save_path, args.source, tuple(map(parse_lora, args.lora))).to_json()
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        display.show_verdict(report)
    return 0 if report["ok"] else 1


def _recipes(args: argparse.Namespace) -> int:
    from streamq import recipe, resolve

    library = resolve.library()
    if args.name is not None:
        if args.name not in library:
            raise UsageError(
                f"recipe {args.name}: not in the library; have: {', '.join(library)}"
                + nearest(args.name, tuple(library))
            )
        print(
            json.dumps({"name": args.name, "yaml": library[args.name]}) if args.json else library[args.name],
            end="\n" if args.json else "",
        )
        return 0
    about = {name: recipe.parse_recipe(text, name, name).document["metadata"] for name, text in library.items()}
    if args.json:
        print(json.dumps(about, indent=1))
        return 0
    for name, metadata in about.items():
        comment = " ".join(line.lstrip("# ") for line in library[name].splitlines() if line.startswith("#"))
        first = comment.partition(". ")[0].rstrip(".") + "."
        print(f"{name}: {metadata['quant_type']} for {', '.join(metadata['formats'])}: {first}")
    return 0


def _video(args: argparse.Namespace) -> int:
    try:
        return int(_video_command(args.command).run(args))
    except ImportError:  # they import torch once there is work for it
        _import_torch()
        raise


COMMANDS = {
    "quant": _quant,
    "plan": _plan,
    "calib": _calib,
    "inspect": _inspect,
    "verify": _verify,
    "recipes": _recipes,
    **dict.fromkeys(VIDEO_COMMANDS, _video),
}


def _underscores(argument: str) -> str:
    """`--model-path=x` is `--model_path=x`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _check_texts(args: argparse.Namespace) -> None:
    """Raise UsageError for a prompt that could not be written into a video's JSON."""
    for name in ("prompt", "negative_prompt", "preview"):
        given = getattr(args, name, None) or ()
        for text in (given,) if isinstance(given, str) else given:
            if any("\ud800" <= letter <= "\udfff" for letter in text):
                raise UsageError(f"--{name}: not UTF-8: {text[:40]!a}; check the terminal's or the script's encoding")


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = [_underscores(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    debug, peers = "--debug" in given, ranks.ALONE
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal that cannot show a box must not end the run
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _interrupt)
        peers = ranks.connect()  # if a launcher started several
        args = _parser().parse_args(given, argparse.Namespace(ranks=peers))
        if peers.count > 1 and args.command != "quant":
            raise UsageError(
                f"streamq {args.command} with {peers.count} processes: only quant divides its work; run one"
            )
        _check_texts(args)
        return COMMANDS[args.command](args)
    except KeyboardInterrupt as stop:
        _tell("; ".join(["interrupted", *map(str, stop.args)]), peers)
        return 130
    except BrokenPipeError:  # `streamq inspect | head`
        sys.stderr.close()
        return 1
    except Exception as error:  # a bug of ours still owes the user its one line and exit status
        if debug:
            traceback.print_exc()
        status, message = _explain(error)
        _tell(" ".join(message.split()), peers)
        return status
    finally:
        ranks.disconnect(peers)


def _tell(message: str, peers: ranks.Ranks) -> None:
    """One line of error a run, however many processes it has."""
    own = peers.speaks()
    print(f"error: {message}" if own else f"process {peers.number} stopped: another one had to", file=sys.stderr)


def _explain(error: Exception) -> tuple[int, str]:
    if isinstance(error, StreamqError):
        return error.status, str(error)
    return 1, f"{type(error).__name__}: {error}; this is a bug in streamq, --debug shows where"
