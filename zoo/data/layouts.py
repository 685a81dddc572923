"""Finds the two halves of paired data sets in the folder layouts that people have on their disks.

Known (S = upscale): Set5/{original,GTmodM,LRbicxS}, Set5/{HR,LR_bicubic/XS}, image_SRF_S/img_001_SRF_S_{HR,LR}.png,
DIV2K_{train,valid}_HR + DIV2K_{train,valid}_LR_bicubic/XS (also _sub), Flickr2K_HR + Flickr2K_LR_bicubic/XS,
pairs of folders such as gt/lq, HQ/LQ, target/input, and a plain folder of clean images. Letter case never matters.
Source: docs/DatasetPreparation.md of BasicSR, EDSR-PyTorch, DIV2K.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zoo.data.images import size_of
from zoo.errors import UserError
from zoo.media import list_images

ALIASES = (("bsd100", "b100", "bsds100"),)
TWINS = (  # gt, lq
    ("gt", "lq"),
    ("gt", "lr"),
    ("hq", "lq"),
    ("hr", "lr"),
    ("target", "input"),
    ("high", "low"),
    ("clean", "noisy"),
    ("sharp", "blur"),
    ("groundtruth", "input"),
)


@dataclass(frozen=True)
class Files:
    """One sample on disk; without an lq file it will be made from gt."""

    name: str
    gt: Path
    lq: Path | None = None


@dataclass
class Found:
    """What a layout holds.

    Args:
        files: the samples.
        layout: one phrase that names what was recognised, for reports.
        without_partner: files whose other half is missing.
    """

    files: list[Files]
    layout: str
    without_partner: list[str] = field(default_factory=list)


def find(root: Path, upscale: int, *, split: str = "train", template: str | None = None) -> Found:
    """Recognise the layout of `root` and match its files.

    Args:
        root: the set's own folder, such as benchmark/Set5.
        upscale: which LR folder to take.
        split: "train" or "valid", where one folder holds both (DIV2K).
        template: name of an lq file without ending, with {} for the name of gt; None = the usual ones are tried.

    Raises:
        FileNotFoundError: there is no such folder, under any usual spelling.
        UserError: no known layout.
    """
    root = locate(root)
    folders = {place.name.lower(): place for place in sorted(root.iterdir()) if place.is_dir()}
    for recognise in (_basicsr, _edsr, _div2k, _twins, _kaggle):
        if found := recognise(root, folders, upscale, split, template):
            return found
    if images := list_images(root):
        return Found([Files(path.name, path) for path in images], "plain folder")
    inside = ", ".join(place.name for place in folders.values()) or "nothing"
    raise UserError(
        f"{root}: no images and no known layout of pairs for upscale {upscale} (it holds {inside[:200]}); "
        "give the folder of gt images, or one with gt/ and lq/"
    )


def locate(root: Path) -> Path:
    """`root`, or the folder beside it that is called the same up to letter case and usual aliases.

    Raises:
        FileNotFoundError: neither exists.
        UserError: it is a file.
    """
    root = root.expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise UserError(f"{root}: not a folder; give the folder that holds the images")
    if root.parent.is_dir():
        for place in sorted(root.parent.iterdir()):
            if place.is_dir() and same_set(place.name, root.name):
                return place
    raise FileNotFoundError(f"{root}: no such folder; check the path")


def same_set(name: str, other: str) -> bool:
    """Whether two names mean one data set: letter case does not matter, and BSD100 is called B100, too."""
    name, other = name.lower(), other.lower()
    return name == other or any(name in group and other in group for group in ALIASES)


def match(gt: Sequence[Path], lq: Sequence[Path], upscale: int, layout: str, template: str | None = None) -> Found:
    """Pair files by name; the ending may differ, and so may letter case.

    Args:
        gt: target files.
        lq: degraded files.
        upscale: for the usual suffixes such as "x4".
        layout: passed on.
        template: see `find`.
    """
    table: dict[str, Path] = {}
    for path in lq:
        table.setdefault(path.stem.lower(), path)
        table[path.name.lower()] = path  # the same ending wins over the first of several
    usual = ("{}", f"{{}}x{upscale}", f"{{}}_x{upscale}", "{}_lr", "{}_lq", f"{{}}_lrbi_x{upscale}")
    templates = (template,) if template else usual
    files, alone, used = [], [], set()
    for path in gt:
        stems = [t.replace("{}", stem) for t in templates for stem in _stems(path.stem)]
        names = [name for stem in stems for name in (f"{stem}{path.suffix}".lower(), stem.lower())]
        partner = next((table[name] for name in names if name in table), None)
        if partner is None:
            alone.append(f"{path.parent.name}/{path.name}")
        else:
            used.add(partner)
            files.append(Files(path.name, path, partner))
    alone += [f"{path.parent.name}/{path.name}" for path in lq if path not in used]
    return Found(files, layout, alone)


def _stems(stem: str) -> list[str]:
    """The gt name, also without a suffix such as _HR or _gt."""
    bare = re.sub(r"_(hr|gt|hq)$", "", stem, flags=re.IGNORECASE)
    return [stem] if bare == stem else [stem, bare]


def _basicsr(root: Path, folders: dict[str, Path], upscale: int, split: str, template: str | None) -> Found | None:
    """Set5/{original,GTmodM,LRbicxS}: of several gt folders the one whose sizes fit the LR files."""
    mods = {int(m[1]): place for name, place in folders.items() if (m := re.fullmatch(r"gtmod(\d+)", name))}
    # The mod of the scale itself first (HAT), then the common one (BasicSR's 12), then the uncropped files.
    order = sorted(mods, key=lambda mod: (mod != upscale, mod % upscale != 0, mod))
    choices = [mods[mod] for mod in order if mod % upscale == 0] + [folders[n] for n in ("original",) if n in folders]
    if not choices:
        return None
    lr = folders.get(f"lrbicx{upscale}")
    if lr is None:
        return Found([Files(p.name, p) for p in list_images(choices[0])], f"{choices[0].name}, no LRbicx{upscale}")
    best: Found | None = None
    for place in choices:
        found = match(list_images(place), list_images(lr), upscale, f"{place.name} + {lr.name}", template)
        if found.files and _fits(found.files[0], upscale):
            return found
        best = best or found
    return best


def _fits(files: Files, upscale: int) -> bool:
    try:
        return files.lq is not None and size_of(files.gt) == tuple(n * upscale for n in size_of(files.lq))
    except (UserError, OSError):
        return False  # damaged: says nothing about the folder


def _edsr(root: Path, folders: dict[str, Path], upscale: int, split: str, template: str | None) -> Found | None:
    """Set5/{HR,LR_bicubic/XS}, or HR alone."""
    if "hr" not in folders or (folders.keys() & {"lr", "lq"} and "lr_bicubic" not in folders):
        return None
    return _with_scale_folder(folders["hr"], folders.get("lr_bicubic"), upscale, template)


def _div2k(root: Path, folders: dict[str, Path], upscale: int, split: str, template: str | None) -> Found | None:
    """DIV2K_train_HR + DIV2K_train_LR_bicubic/XS, Flickr2K_HR + Flickr2K_LR_bicubic/XS; sub-images where cut."""
    names = [m for name in folders if (m := re.fullmatch(r"(\w+?)(_train|_valid)?_hr(_sub)?", name))]
    # Never another split than the one asked for: validating on training images must not happen by accident.
    names = sorted((m for m in names if m[2] in (None, f"_{split}")), key=lambda m: (m[2] is None, m[3] is None, m[0]))
    if not names:
        return None
    base, part, cut = names[0].groups(default="")
    lr = folders.get(f"{base}{part}_lr_bicubic")
    return _with_scale_folder(folders[names[0][0]], lr, upscale, template, suffix=cut)


def _with_scale_folder(hr: Path, lr: Path | None, upscale: int, template: str | None, suffix: str = "") -> Found:
    inner = {place.name.lower(): place for place in sorted(lr.iterdir()) if place.is_dir()} if lr else {}
    place = inner.get(f"x{upscale}{suffix}")
    if place is None:
        files = [Files(path.name, path) for path in list_images(hr)]
        return Found(files, f"{hr.name}, no lq folder for x{upscale}")
    return match(
        list_images(hr), list_images(place), upscale, f"{hr.name} + {place.parent.name}/{place.name}", template
    )


def _twins(root: Path, folders: dict[str, Path], upscale: int, split: str, template: str | None) -> Found | None:
    """Two folders beside each other, such as gt/ and lq/; the lq folder may hold one folder per scale."""
    for clean, bad in TWINS:
        if clean in folders and bad in folders:
            gt, lq = folders[clean], folders[bad]
            if not list_images(lq):
                return _with_scale_folder(gt, lq, upscale, template)
            return match(list_images(gt), list_images(lq), upscale, f"{gt.name} + {lq.name}", template)
    return None


def _kaggle(root: Path, folders: dict[str, Path], upscale: int, split: str, template: str | None) -> Found | None:
    """image_SRF_S/img_001_SRF_S_{HR,LR}.png, `root` being that folder or the one above."""
    place = folders.get(f"image_srf_{upscale}", root)
    ending = re.compile(rf"(.+)_srf_{upscale}_(hr|lr)", re.IGNORECASE)
    halves: dict[str, list[Path]] = {"hr": [], "lr": []}
    for path in list_images(place):
        if m := ending.fullmatch(path.stem):
            halves[m[2].lower()].append(path)
    if not halves["hr"]:
        return None
    return match(halves["hr"], halves["lr"], upscale, f"{place.name}/*_HR + *_LR", template or None)
