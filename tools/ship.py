#!/usr/bin/env python3
"""Ship the weights of a finished run in fp16, its log and its row in index.yaml.

    python tools/ship.py runs/0001 hat-tiny-x2 --hardware "one core of an AMD EPYC, 43 minutes"
    python tools/ship.py runs/0002 shapes-vae --into shapes-sd --hardware "..."
    python tools/ship.py runs/0003 shapes-sd --hardware "..."

Restorers become checkpoints/NAME.safetensors, measured on the validation photos: super-resolution clean and with the LR
saved as JPEG q 75, upscale 1 in rain, snow and behind raindrops. Feature networks are measured by how far they find
spoilt scenes from others. Autoencoders and pipelines become folders of diffusers, pipelines measured on 500 unseen
prompts, also without their self-attention. Figures are those of the files as shipped.
"""

import argparse
import hashlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from zoo import models, shipped
from zoo.data.blur import filter2d, gaussian_kernel
from zoo.data.degradations import add_noise
from zoo.data.images import to_array, to_tensor
from zoo.data.shapes import draw, render
from zoo.errors import UserError
from zoo.evaluate.generators import PromptTrial, unseen
from zoo.evaluate.restorers import Scores, evaluate
from zoo.files import write_file
from zoo.metrics import fid
from zoo.metrics.prompt import adherence
from zoo.metrics.psnr_ssim import Protocol
from zoo.models.weights import write_weights
from zoo.pipelines.parts import SETTINGS, build_parts, digest, open_pipeline, quiet, to_latents, to_pixels
from zoo.scene import parse
from zoo.tracking import read_table

TOP = shipped.folder("checkpoints")
ENLARGED, SAME_SIZE = ("bicubic", "bicubic+jpeg75"), ("rain", "snow", "raindrops")
SCENES = 2000
SPOILT = {
    "other unseen scenes": lambda images: images,
    "blurred by 0.5 pixels": lambda images: filter2d(images, gaussian_kernel(11, 0.5)),
    "blurred by 1 pixel": lambda images: filter2d(images, gaussian_kernel(11, 1.0)),
    "with noise of 10/255": lambda images: torch.stack([add_noise(x, 10, n) for n, x in enumerate(images)]),
    "with noise of 25/255": lambda images: torch.stack([add_noise(x, 25, n) for n, x in enumerate(images)]),
}


def figures(scores: Scores) -> dict[str, str]:
    """The mean of one table in words."""
    name = f"photos, {scores.degradation}, {scores.protocol}"
    return {name: f"{scores.psnr:.2f} dB ({before(scores.upscale)} {scores.bicubic_psnr:.2f})"}


def before(upscale: int) -> str:
    """What a restored photo is compared with."""
    return "bicubic" if upscale > 1 else "input"


def ship_network(run: Path, name: str) -> dict[str, Any]:
    """Write NAME.safetensors; returns what its row tells beside the training."""
    network = models.load(run)
    if network.config != models.create(name).config:
        raise UserError(f"ship: {run} holds another network than {name}")
    network.variant = name
    file = write_weights(TOP / f"{name}.safetensors", network, dtype=torch.float16, force=True)
    measured = restorer_figures(file) if models.lookup(models.family_of(network)).needs else feature_figures(run, file)
    return {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **measured}


def feature_figures(run: Path, file: Path) -> dict[str, Any]:
    """How far spoilt scenes are from others, and what was told rightly at the end of training."""
    scenes = [[draw(seed, n, held_out=True) for n in range(SCENES)] for seed in (0, 1)]
    first, other = (torch.stack([to_tensor(render(s.scene, s.places)) for s in some]) for some in scenes)
    found = {name: fid.scores(spoil(first), other, file) for name, spoil in SPOILT.items()}
    rows, _ = read_table(run / "metrics.csv")
    last = next(row for row in reversed(rows) if "val/accuracy" in row)
    told = {key.removeprefix("val/"): f"{100 * float(value):.1f} %" for key, value in last.items() if key[:4] == "val/"}
    distances = {f"{name}, {one.metric}, {SCENES:,} images": str(one) for name, both in found.items() for one in both}
    return {"figures": distances, "unseen scenes told rightly": told}


def restorer_figures(file: Path) -> dict[str, Any]:
    """PSNR on the validation photos."""
    upscale = models.needs(models.load(file)).upscale
    tables = [evaluate(file, degradation=name) for name in (ENLARGED if upscale > 1 else SAME_SIZE)]
    return {
        "figures": {key: value for scores in tables for key, value in figures(scores).items()},
        "per_image": {
            scores.degradation: {
                r.image: {"psnr": round(r.psnr, 3), before(upscale): round(r.bicubic_psnr, 3)} for r in scores.rows
            }
            for scores in tables
        },
    }


def ship_autoencoder(run: Path, into: str) -> dict[str, Any]:
    """Write checkpoints/INTO/vae; returns what its row tells beside the training."""
    import diffusers

    vae = diffusers.AutoencoderKL.from_pretrained(run / "vae").half()
    with quiet():
        vae.save_pretrained(TOP / into / "vae")
    shipped_vae, samples = build_parts({"vae": str(TOP / into / "vae")})["vae"].float(), unseen(0, 300)
    real = [render(sample.scene, sample.places) for sample in samples]
    with torch.no_grad():
        images = torch.stack([to_tensor(image) for image in real]).split(30)
        back = torch.cat([to_pixels(shipped_vae, to_latents(shipped_vae, some)) for some in images])
    protocol = Protocol()
    psnr = sum(protocol.psnr(a, b) for a, b in zip(back, torch.cat(images), strict=True)) / len(real)
    kept = adherence((to_array(image), parse(s.caption)) for image, s in zip(back, samples, strict=True))["all"]
    told = {f"300 unseen scenes, reconstructed, {protocol}": f"{psnr:.2f} dB, {100 * kept:.1f} % still as captioned"}
    return {"folder": f"{into}/vae", "figures": told}


def ship_pipeline(run: Path, name: str) -> dict[str, Any]:
    """Write checkpoints/NAME; returns what its row tells beside the training."""
    pipe = open_pipeline(str(run))
    vae = TOP / name / "vae"
    if vae.is_dir() and digest(pipe.vae.half()) != digest(build_parts({"vae": str(vae)})["vae"].half()):
        raise UserError(f"ship: {run} was trained with another autoencoder than {vae}; ship that one first")
    for part, network in pipe.components.items():
        if isinstance(network, torch.nn.Module) and not (part == "vae" and vae.is_dir()):
            network.half()
    with quiet():
        for part, component in pipe.components.items():
            if component is not None and not (part == "vae" and vae.is_dir()):
                component.save_pretrained(TOP / name / part)
        # transformers computes in the dtype that the config tells of, unlike diffusers; only the file is fp16.
        for part, component in pipe.components.items():
            if isinstance(component, PreTrainedModel):
                component.config.dtype = torch.float32
                component.config.save_pretrained(TOP / name / part)
    write_file(TOP / name / "model_index.json", (run / "pipeline" / "model_index.json").read_bytes(), force=True)
    write_file(TOP / name / SETTINGS, (run / "pipeline" / SETTINGS).read_bytes(), force=True)
    trial = PromptTrial(name, 500)
    rows = {row.name: row for row in trial.run()}
    blind = PromptTrial(name, 500, features=None)
    for path, layer in blind.sampler.pipe.unet.named_modules():
        if path.endswith(".attn1"):
            layer.register_forward_hook(lambda layer, given, out: torch.zeros_like(out))
    rows["without self-attention"] = next(row for row in blind.run() if row.name == blind.sampler.name)
    shares = {
        f"{label}, all right": ", ".join(
            [f"{100 * row.share():.1f} %", *(f"{n}: {100 * row.share(things=n):.1f} %" for n in (1, 2, 3))]
        )
        for label, row in rows.items()
    }
    distances = {f"{label}, {score.label}": str(score) for label, row in rows.items() for score in row.distances}
    return {"folder": name, "figures": {"protocol": trial.protocol, **shares, **distances}}


def main() -> int:
    """Write weights, log and row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished `zoo fit`")
    parser.add_argument("name", help="the variant, or the recipe of an autoencoder or a pipeline")
    parser.add_argument("--into", help="pipeline that an autoencoder belongs to")
    parser.add_argument("--hardware", required=True, help="where it was trained and how long it took")
    args = parser.parse_args()
    status = json.loads((args.run / "status.json").read_text())
    if status["state"] != "finished":
        print(f"ship: {args.run} is {status['state']}; finish it with zoo fit --resume={args.run}", file=sys.stderr)
        return 2
    write_file(TOP / "logs" / f"{args.name}.csv", (args.run / "metrics.csv").read_bytes(), force=True)
    if (args.run / "pipeline").is_dir():
        found = ship_pipeline(args.run, args.name)
    elif (args.run / "vae").is_dir():
        found = ship_autoencoder(args.run, args.into or args.name)
    else:
        found = ship_network(args.run, args.name)
    row = {
        "source": f"zoo fit {args.name}",
        "licence": "Apache-2.0",
        "recipe": next(line for line in shipped.recipes() if line.endswith(f"/{args.name}")),
        "log": f"logs/{args.name}.csv",
        "training": f"{status['step']} steps, {args.hardware}",
        **found,
    }
    index = TOP / "index.yaml"
    block = yaml.safe_dump({args.name: row}, sort_keys=False, allow_unicode=True, width=120)
    old = rf"^{re.escape(args.name)}:\n(?:[ ].*\n)*"
    text, replaced = re.subn(old, lambda _: block, index.read_text(), flags=re.MULTILINE)
    write_file(index, text if replaced else text + block, force=True)
    print(block, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
