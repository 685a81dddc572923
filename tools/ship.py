#!/usr/bin/env python3
"""Ship the weights of a finished run: checkpoints/NAME.safetensors (fp16), its log and its row in index.yaml.

    python tools/ship.py runs/0001 hat-tiny-x2 --hardware "one core of an AMD EPYC, 43 minutes"

The figures are measured on the validation photos with the file as shipped, clean and with the LR saved as JPEG q 75.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import torch
import yaml

from zoo import models, shipped
from zoo.evaluate import Scores, evaluate
from zoo.models.weights import write_weights

DEGRADATIONS = ("bicubic", "bicubic+jpeg75")


def figures(scores: Scores) -> dict[str, str]:
    """The mean of one table in words."""
    name = f"photos, {scores.degradation}, {scores.protocol}"
    return {name: f"{scores.psnr:.2f} dB (bicubic {scores.bicubic_psnr:.2f})"}


def main() -> int:
    """Write the three files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished `zoo fit`")
    parser.add_argument("name", help="the variant")
    parser.add_argument("--hardware", required=True, help="where it was trained and how long it took")
    args = parser.parse_args()
    status = json.loads((args.run / "status.json").read_text())
    if status["state"] != "finished":
        print(f"ship: {args.run} is {status['state']}; finish it with zoo fit --resume={args.run}", file=sys.stderr)
        return 2
    top = shipped.folder("checkpoints")
    network = models.load(args.run)
    if network.variant != args.name:
        print(f"ship: {args.run} holds {network.variant}, not {args.name}", file=sys.stderr)
        return 2
    file = write_weights(top / f"{args.name}.safetensors", network, dtype=torch.float16, force=True)
    (top / "logs").mkdir(exist_ok=True)
    shutil.copy(args.run / "metrics.csv", top / "logs" / f"{args.name}.csv")
    tables = [evaluate(file, degradation=degradation) for degradation in DEGRADATIONS]
    recipe = next(line for line in shipped.recipes() if line.endswith(f"/{args.name}"))
    row = {
        "source": f"zoo fit {args.name}",
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "licence": "Apache-2.0",
        "recipe": recipe,
        "log": f"logs/{args.name}.csv",
        "training": f"{status['step']} steps, {args.hardware}",
        "figures": {name: value for scores in tables for name, value in figures(scores).items()},
        "per_image": {
            scores.degradation: {
                r.image: {"psnr": round(r.psnr, 3), "bicubic": round(r.bicubic_psnr, 3)} for r in scores.rows
            }
            for scores in tables
        },
    }
    index = top / "index.yaml"
    text = re.sub(rf"^{re.escape(args.name)}:\n(?:[ ].*\n)*", "", index.read_text(), flags=re.MULTILINE)
    block = yaml.safe_dump({args.name: row}, sort_keys=False, allow_unicode=True, width=120)
    index.write_text(text + block)
    print(block, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
