"""`zoo export MODEL OUT`: a restorer as a file that runs without zoo, compared with the network before it is kept."""

import argparse
import json
import re
import time

from zoo.cli import options
from zoo.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `zoo export`."""
    parser.add_argument("model", metavar="MODEL", help="a name of `zoo list`, a file, a run folder")
    parser.add_argument("target", metavar="OUT", nargs="?", help="ends in .pt2 (torch.export) or .onnx")
    parser.add_argument("--size", type=_size, metavar="HxW", help="take this size only; default: any that fits")
    parser.add_argument("--tolerance", type=float, metavar="X", help="accept this difference of the largest output")
    options.add(parser, "out", "force", "json")


def run(args: argparse.Namespace) -> int:
    """Export, compare and tell; returns the exit code."""
    if bool(args.target) == bool(args.out):
        raise UserError("export: name one file to be made, such as hat.onnx or hat.pt2")
    from zoo.export import TOLERANCE, export
    from zoo.pipelines.restoring import prepare

    began = time.monotonic()
    network = prepare(args.model, device="cpu")
    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    made = export(network, args.target or args.out, size=args.size, tolerance=tolerance, force=args.force)
    sizes = [f"{width}x{height}" for height, width in made.sizes]
    if args.json:
        found = {
            "path": str(made.path),
            "compared": sizes,
            "error": made.error,
            "own": made.own,
            "multiple": made.multiple,
        }
        print(json.dumps({**found, "any_size": made.dynamic, "seconds": round(time.monotonic() - began, 1)}, indent=2))
        return 0
    takes = f"sides that are multiples of {made.multiple}" if made.dynamic else f"{sizes[0]} only"
    print(f"{made.path}: takes (1, c, h, w) in [0, 1], {takes}; pad by reflection and crop for others")
    own = f" (its own, rounded otherwise: {made.own:.1e}, as it sorts)" if made.own else ""
    print(
        f"compared with the network at {' and '.join(sizes)}: "
        f"largest difference {made.error:.1e} of the largest output{own}"
    )
    return 0


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"must be height x width such as 128x192, got {text!r}")
    return int(match[1]), int(match[2])
