"""`zoo restore IN [OUT]`: an image, a video or a folder of them through a model; what is finished is never lost."""

import argparse
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from zoo.cli import options
from zoo.cli.progress import Progress
from zoo.errors import UserError
from zoo.media import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    VIDEO_SUFFIXES,
    Picture,
    check_output,
    check_video_output,
    hot_spot,
    is_video,
    list_images,
    read_image,
    side_by_side,
    to_pil,
    video_ending,
    write_image,
)

if TYPE_CHECKING:
    from torch import nn

    from zoo.pipelines.tiling import TileProgress

_PROBLEM, _INTERRUPTED = 2, 130


@dataclass
class Work:
    """What is to be done, and what has been.

    Attributes:
        pairs: source and target of every image and video.
        where: the folder or file that holds the results.
        skipped: how many targets were there and are left alone.
        done: a record of each written file.
        failed: a record of each file that could not be restored.
    """

    pairs: list[tuple[Path, Path]]
    where: Path
    skipped: int = 0
    done: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `zoo restore`."""
    parser.add_argument("source", metavar="IN", help="an image, a video (MP4, MKV, MOV, WebM, AVI, ...) or a folder")
    parser.add_argument("target", metavar="OUT", nargs="?", help="file or folder; left out: beside IN, as NAME_x2.png")
    parser.add_argument(
        "--model", default="hat-tiny-x2", metavar="M", help="a name of `zoo list`, a file, a run folder"
    )
    parser.add_argument("--tile", type=parse_tile, default="auto", metavar="N", help="side of the tiles, auto or off")
    options.add(parser, "padding")
    parser.add_argument("--overlap", type=_count, metavar="N", help="context around a tile in pixels; else by model")
    parser.add_argument("--ensemble", action="store_true", help="mean over 8 flips and turns: better, 8 times the work")
    parser.add_argument("--compile", action="store_true", help="torch.compile first: for many images of one size")
    parser.add_argument("--suffix", metavar="TEXT", help="appended to names; else _x2 beside IN and nothing in OUT")
    parser.add_argument("--skip-existing", action="store_true", help="leave finished pictures alone and go on")
    parser.add_argument("--compare", action="store_true", help="of images, also write NAME_compare.png")
    parser.add_argument("--max-pixels", type=_count, default=MAX_PIXELS, metavar="N", help="refuse larger images")
    options.add(parser, "device", "dtype", "out", "force", "json")


def run(args: argparse.Namespace) -> int:
    """Restore; returns the exit code."""
    source = Path(args.source).expanduser()
    sources = _sources(source)
    if args.target and args.out:
        raise UserError(f"restore: OUT {args.target} and --out {args.out} are both given; keep one")
    from zoo.models import needs
    from zoo.pipelines.restoring import facts, prepare

    dtype = args.dtype or "float32"
    network = prepare(args.model, device=args.device, dtype=dtype, compiled=args.compile)
    upscale = needs(network).upscale
    work = plan(source, sources, args.target or args.out, args.suffix, upscale)
    _check_targets(work, args)
    metadata = facts(network, dtype=dtype, tile=args.tile, padding=args.padding, ensemble=args.ensemble)
    try:
        code = _restore_all(work, network, args, metadata)
    except (UserError, OSError):  # such as a full disk: what is finished stays, and is told
        if work.done:
            _report(work, args, metadata, stopped=True)
        raise
    _report(work, args, metadata, stopped=code == _INTERRUPTED)
    return code


def plan(source: Path, sources: list[Path], out: str | None, suffix: str | None, upscale: int) -> Work:
    """Which file becomes which.

    Args:
        source: what the user named, a file or a folder.
        sources: the images in it.
        out: what the user named for the result.
        suffix: appended to the stem of every name; None = by place.
        upscale: of the model, for the suffix beside the source.

    Raises:
        UserError: `out` does not fit `source`, or `suffix` no file name.
    """
    if Path(f"a{suffix or ''}").name != f"a{suffix or ''}":
        raise UserError(f"--suffix {suffix}: becomes part of a file name; leave out the slash")
    beside = suffix if suffix is not None else (f"_x{upscale}" if upscale > 1 else "_restored")
    if not source.is_dir():
        folder = out is not None and (Path(out).expanduser().is_dir() or out.endswith("/") or not Path(out).suffix)
        if out is None:
            target = source.with_name(f"{source.stem}{beside}{_ending(source)}")
        elif folder:
            target = Path(out).expanduser() / f"{source.stem}{suffix or ''}{_ending(source)}"
        elif suffix is not None:
            raise UserError(f"--suffix {suffix}: OUT {out} already is the whole name; leave one of them out")
        else:
            target = Path(out).expanduser()
        return Work([(source, target)], target)
    top = source.resolve()
    if out is None:
        root, suffix = top.with_name(top.name + beside), ""
    else:
        root = Path(out).expanduser()
    if root.is_file() or root.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES):
        raise UserError(f"{root}: is a file, and IN is a folder; name a folder for the results")
    if root.resolve() != top:  # what an earlier run put below IN is no source
        sources = [path for path in sources if not path.resolve().is_relative_to(root.resolve())]
    plain = {
        path: root / path.relative_to(source).with_name(f"{path.stem}{suffix or ''}{_ending(path)}") for path in sources
    }
    often = Counter(plain.values())
    targets: dict[Path, Path] = {}
    taken: set[Path] = set()
    for path in sorted(sources, key=lambda path: often[plain[path]] > 1):  # who has a name alone keeps it
        for target in _names(path, plain[path], suffix or "", alone=often[plain[path]] == 1):
            # The comparison also without --compare, which shall rename nothing.
            files = {target} if is_video(path) else {target, _compare_name(target)}
            if not files & taken:
                break
        targets[path] = target
        taken |= files
    return Work([(path, targets[path]) for path in sources], root)


def _names(source: Path, plain: Path, suffix: str, *, alone: bool) -> Iterator[Path]:
    """What the result of `source` may be called: a.png; where a.jpg and a.png meet, a_jpg.png; then a_jpg_2.png, ..."""
    if alone:
        yield plain
    for number in itertools.count(1):
        counted = f"_{number}" if number > 1 else ""
        yield plain.with_name(f"{source.stem}_{source.suffix[1:]}{counted}{suffix}{plain.suffix}")


def _ending(source: Path) -> str:
    return video_ending(source) if is_video(source) else ".png"


def _sources(source: Path) -> list[Path]:
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder; check the path")
    if not source.is_dir():
        return [source]
    found = list_images(source, recursive=True, suffixes=IMAGE_SUFFIXES + VIDEO_SUFFIXES)
    if not found:
        kinds = ", ".join(suffix[1:] for suffix in IMAGE_SUFFIXES)
        raise UserError(f"{source}: holds no images ({kinds}) and no videos; name the folder that does")
    return found


def _check_targets(work: Work, args: argparse.Namespace) -> None:
    """Refuse before any work what would be refused after it."""
    if args.force and args.skip_existing:
        raise UserError("restore: --force replaces what --skip-existing leaves alone; keep one of them")
    originals = {path.resolve() for path, _ in work.pairs}
    for path, target in work.pairs:
        (check_video_output if is_video(path) else check_output)(target)
        for file in (target, _compare_name(target)) if args.compare and not is_video(path) else (target,):
            if file.resolve() in originals:
                raise UserError(f"{path}: the result {file} would replace an input; name another OUT or a --suffix")
    taken = [target for _, target in work.pairs if target.exists()]
    if args.skip_existing:
        work.skipped = len(taken)
        work.pairs = [pair for pair in work.pairs if not pair[1].exists()]
    if args.compare:
        taken += [_compare_name(target) for _, target in work.pairs if _compare_name(target).exists()]
    if taken and not args.force and not args.skip_existing:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        others = ", --skip-existing leaves them alone" if len(work.pairs) > 1 else ""
        raise FileExistsError(f"{taken[0]}{more}: exists already; --force replaces it{others}, or name another OUT")
    for _, target in work.pairs[:1]:
        place = next(folder for folder in target.absolute().parents if folder.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UserError(f"{place}: not a folder that can be written to; name another OUT")


def _restore_all(work: Work, network: "nn.Module", args: argparse.Namespace, metadata: dict[str, str]) -> int:
    many, films = len(work.pairs) > 1, any(is_video(path) for path, _ in work.pairs)
    unit = ("files" if films else "images") if many else "frames" if films else "tiles"
    with Progress(unit, len(work.pairs), quiet=args.quiet) as bar:
        try:
            for number, (source, target) in enumerate(work.pairs):

                def parts(done: float, total: int, number: int = number, name: str = source.name) -> None:
                    if many:
                        bar.update(number + done / max(total, 1), note=name)
                    else:
                        bar.update(done, total, note=name)

                began = time.monotonic()
                try:
                    if is_video(source):
                        record = _filmed(source, target, network, args, metadata, parts)
                        work.done.append(record | {"seconds": round(time.monotonic() - began, 2)})
                        continue
                    picture, restored = _restored(source, target, network, args, parts)
                except (UserError, FileNotFoundError) as error:
                    if not many:
                        raise
                    work.failed.append({"input": str(source), "error": str(error)})
                    bar.say(f"zoo: {error}")
                    continue
                # outside `try`: a place that takes no file now, such as a full disk, will not take the next one
                record = _written(source, target, picture, restored, args, metadata)
                work.done.append(record | {"seconds": round(time.monotonic() - began, 2)})
        except KeyboardInterrupt:
            return _INTERRUPTED
    return _PROBLEM if work.failed else 0


def _restored(
    source: Path, target: Path, network: "nn.Module", args: argparse.Namespace, tiles: "TileProgress"
) -> tuple[Picture, Picture]:
    """The picture and what the model makes of it."""
    from zoo.pipelines.restoring import restore_picture

    picture = read_image(source, max_pixels=args.max_pixels)
    check_output(target, alpha=picture.alpha is not None)
    return picture, restore_picture(network, picture, **_how(args), progress=tiles)


def _how(args: argparse.Namespace) -> dict[str, Any]:
    """The keywords of restoring that are flags."""
    flags = {name: getattr(args, name) for name in ("tile", "overlap", "padding", "ensemble")}
    return flags | {"dtype": args.dtype or "float32"}


def _written(
    source: Path,
    target: Path,
    picture: Picture,
    restored: Picture,
    args: argparse.Namespace,
    metadata: dict[str, str],
) -> dict[str, Any]:
    """Put the results in place; returns their record."""
    bits = picture.bits if target.suffix.lower() == ".png" else 8  # other endings were the user's choice
    write_image(target, restored, bits=bits, metadata=metadata, force=args.force)
    record = {"input": str(source), "output": str(target)}
    if args.compare:
        figure = _comparison(picture, restored, metadata["zoo:model"])
        record["compare"] = str(write_image(_compare_name(target), figure, force=args.force))
    (height, width), (h, w) = picture.pixels.shape[:2], restored.pixels.shape[:2]
    return record | {"size": [width, height], "restored_size": [w, h]}


def _filmed(
    source: Path,
    target: Path,
    network: "nn.Module",
    args: argparse.Namespace,
    metadata: dict[str, str],
    parts: Callable[[float, int], None],
) -> dict[str, Any]:
    """Restore a video; returns its record."""
    from zoo.pipelines.restoring import restore_video

    note = "; ".join(f"{name}={text}" for name, text in metadata.items())
    made = restore_video(network, source, target, **_how(args), progress=parts, note=note, force=args.force)
    told = {"frames": made.frames, "fps": round(made.fps, 3), "audio_tracks": made.audio, "lost": made.lost}
    sizes = {"size": list(made.size), "restored_size": list(made.new_size)}
    return {"input": str(source), "output": str(made.path)} | sizes | told


def _compare_name(target: Path) -> Path:
    return target.with_name(f"{target.stem}_compare.png")


def _comparison(picture: Picture, restored: Picture, model: str) -> np.ndarray:
    """Input, bicubic and restored, with the square magnified in which the model changed most."""
    (height, width), size = picture.pixels.shape[:2], restored.pixels.shape[1::-1]
    before, after = (_on_white(p) for p in (picture, restored))
    bicubic = np.asarray(Image.fromarray(before).resize(size, Image.Resampling.BICUBIC))
    change = np.abs(bicubic.astype(np.float32) - after).mean(axis=2)
    labels = [f"input, {width}x{height}", f"bicubic, {size[0]}x{size[1]}", f"{model}, {size[0]}x{size[1]}"]
    return side_by_side([before, bicubic, after], labels, zoom=hot_spot(change, 128))


def _on_white(picture: Picture) -> np.ndarray:
    image = to_pil(Picture(picture.pixels, picture.alpha)).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _report(work: Work, args: argparse.Namespace, metadata: dict[str, str], *, stopped: bool) -> None:
    if args.json:
        facts = {"model": metadata["zoo:model"], "weights": metadata["zoo:weights"], "where": str(work.where)}
        counts = {"stopped": stopped, "skipped": work.skipped}
        print(json.dumps({**facts, **counts, "done": work.done, "failed": work.failed}, indent=2))
        return
    if args.quiet:
        return
    how = f"{metadata['zoo:model']}, {metadata['zoo:dtype']}, tile {metadata['zoo:tile']}"
    if len(work.pairs) == 1 and work.done and not work.skipped:
        one = work.done[0]
        sizes = ("x".join(map(str, one[key])) for key in ("size", "restored_size"))
        print(f"{one['output']}: {' -> '.join(sizes)} in {one['seconds']:.1f} s ({how})")
        if "frames" in one:
            lost = f", {one['lost']} damaged packets left out" if one["lost"] else ""
            tracks = f"{one['audio_tracks']} audio track{'' if one['audio_tracks'] == 1 else 's'}"
            print(f"{one['frames']} frames at {one['fps']:g} per second, {tracks} copied{lost}")
        if "compare" in one:
            print(f"{one['compare']}: input, bicubic and restored side by side")
        return
    films = any(is_video(path) for path, _ in work.pairs)
    parts = [f"{len(work.done)} of {len(work.pairs)} {'files' if films else 'images'} restored"]
    parts += [f"{work.skipped} left as found"] if work.skipped else []
    parts += [f"{len(work.failed)} could not be restored (named above)"] if work.failed else []
    parts += ["stopped: --skip-existing goes on from here"] if stopped else []
    print(f"{work.where}: {', '.join(parts)} ({how})")


def parse_tile(text: str) -> int | str | None:
    """What --tile means: None = off.

    Raises:
        argparse.ArgumentTypeError: neither a number nor auto nor off.
    """
    if text in ("auto", "off"):
        return None if text == "off" else text
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a number of pixels, auto or off, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(text)
