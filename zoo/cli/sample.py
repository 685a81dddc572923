"""`zoo sample --prompt TEXT`: prompts to pictures and a labelled grid of them, in a new folder each time."""

import argparse
import json
import logging
import time
from pathlib import Path

from zoo import media
from zoo.cli import options
from zoo.cli.progress import Progress
from zoo.errors import UserError
from zoo.files import next_folder

log = logging.getLogger(__name__)

_SHOWN = 16  # pictures in the grid; the files hold all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `zoo sample`."""
    parser.add_argument("--prompt", action="append", required=True, metavar="TEXT", help="may be given several times")
    parser.add_argument(
        "--pipeline", default="shapes-sd", metavar="P", help="a diffusers folder, a run folder, or a hub id"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps; else as the pipeline has it")
    parser.add_argument("--guidance", type=float, metavar="X", help="classifier-free guidance; else as the pipeline")
    parser.add_argument("--negative", metavar="TEXT", help="what the picture shall not show")
    parser.add_argument("--num", type=int, default=4, metavar="N", help="pictures of each prompt (4)")
    parser.add_argument("--size", type=_size, metavar="WxH", help="pixels, such as 64 or 96x64; else as the pipeline")
    parser.add_argument("--scheduler", metavar="NAME", help="of diffusers, such as DPMSolverMultistep")
    parser.set_defaults(out="outputs/samples")
    options.add(parser, "device", "dtype", "seed", "out", "json")


def run(args: argparse.Namespace) -> int:
    """Sample; returns the exit code."""
    if args.num < 1:
        raise UserError(f"--num must be at least 1, got {args.num}")
    if any(not prompt.strip() for prompt in args.prompt):
        raise UserError("--prompt is empty; say what the picture shall show, such as 'a red circle'")
    import torch

    from zoo.pipelines.devices import torch_device
    from zoo.pipelines.sampling import Sampler, Settings

    settings = Settings(args.steps, args.guidance, args.negative, args.size, args.scheduler, args.seed or 0)
    device, dtype = torch_device(args.device), getattr(torch, args.dtype or "float32")
    sampler = Sampler(args.pipeline, settings, device=device, dtype=dtype)
    for prompt in args.prompt:
        for sentence in sampler.advice(prompt):
            log.warning("%s", sentence)
    folder: Path | None = None  # made with the first picture: what is refused leaves nothing behind
    began, records, shown, code = time.monotonic(), [], [], 0
    weights = sampler.weights
    total = len(args.prompt) * args.num * sampler.steps
    try:
        with Progress("steps", total, quiet=args.quiet) as bar:
            for made in sampler.sample(
                args.prompt, args.num, step=lambda done, whole, prompt: bar.update(done, whole, prompt[:40])
            ):
                facts = sampler.facts(made) | {"zoo:weights": f"sha256 {weights}"}
                folder = folder or next_folder(Path(args.out))
                path = folder / f"{len(records):03d}_seed{made.seed}.png"
                media.write_image(path, made.pixels, metadata=facts)
                records.append({"file": str(path), "prompt": made.prompt, "seed": made.seed})
                shown.append((made.pixels, f"{made.prompt}, seed {made.seed}"))
    except KeyboardInterrupt:
        code = 130  # what is finished stays
    if folder is not None:
        guidance = "" if sampler.guidance is None else f", guidance {sampler.guidance:g}"
        title = f"{sampler.name}: {sampler.steps} steps{guidance}"
        columns = args.num if 1 < args.num <= 8 else None
        sheet = media.grid(*zip(*shown[:_SHOWN], strict=True), columns=columns, title=title)
        media.write_image(folder / "grid.png", sheet, metadata={"zoo:weights": f"sha256 {weights}"})
        _report(args, folder, records, weights, time.monotonic() - began)
    return code


def _report(args: argparse.Namespace, folder: Path, records: list[dict], weights: str, seconds: float) -> None:
    if args.json:
        print(json.dumps({"folder": str(folder), "weights": weights, "seconds": round(seconds, 2), "done": records}))
    elif not args.quiet:
        print(f"{folder / 'grid.png'}: {len(records)} pictures in {seconds:.1f} s, single files beside it")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not width.isdecimal() or not (height or width).isdecimal():
        raise argparse.ArgumentTypeError(f"must be pixels such as 64 or 96x64, got {text!r}")
    return int(width), int(height or width)
