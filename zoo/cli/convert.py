"""`zoo convert OLD NEW`: weights of any wrapping as one safetensors file that tells what it is."""

import argparse
import json
from pathlib import Path

from zoo.cli.options import add
from zoo.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("old", metavar="OLD", help="a file such as HAT_SRx4.pth, a run, a shipped model, or a hub id")
    parser.add_argument("new", metavar="NEW", help="the file to write, ending in .safetensors")
    add(parser, "dtype", "force", "json")


def run(args: argparse.Namespace) -> int:
    """Load, which shows that everything fits, and write."""
    new = Path(args.new)
    if new.suffix != ".safetensors":
        raise UserError(f"convert: NEW must end in .safetensors, got {args.new!r}")
    if new.exists() and not args.force:
        raise FileExistsError(f"convert: {new} exists; choose another name or give --force")
    import torch

    from zoo import models
    from zoo.models.weights import write_weights

    network = models.load(args.old)
    write_weights(new, network, dtype=getattr(torch, args.dtype) if args.dtype else None, force=args.force)
    tensors = network.state_dict()
    facts = {
        "file": str(new),
        "bytes": new.stat().st_size,
        "family": models.family_of(network),
        "variant": network.variant,
        "tensors": len(tensors),
    }
    said = f"{new}: {network.variant or facts['family']}, {len(tensors)} tensors, {facts['bytes'] / 1e6:.1f} MB"
    print(json.dumps(facts) if args.json else said)
    return 0
