#!/usr/bin/env python3
"""Write the manifest of a weight file: {parameter name: shape} as JSON, the first step of adding a model.

python tools/dump_keys.py weights.pth checkpoints/manifests/NAME.keys.json
"""

import argparse
import json
import sys
from pathlib import Path

from zoo.errors import UserError
from zoo.models.weights import read_weights


def main() -> int:
    """Read the weights without running code, write names and shapes in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="safetensors, or a file of torch.save")
    parser.add_argument("manifest", type=Path, help="JSON file to write")
    args = parser.parse_args()
    try:
        state, _ = read_weights(args.weights)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    shapes = {key: list(value.shape) for key, value in state.items()}
    args.manifest.write_text(json.dumps(shapes, separators=(",", ":")), encoding="utf-8")
    print(f"{args.manifest}: {len(shapes)} tensors, {sum(v.numel() for v in state.values()):,} numbers")
    return 0


if __name__ == "__main__":
    sys.exit(main())
