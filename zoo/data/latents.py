"""Images encoded once instead of in every step: latents, captions and text embeddings in sharded safetensors.

A shard is written whole or not at all, so that an encoding that was ended goes on with the first missing shard.
Reading maps the files into memory: what is not drawn is not read.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.data.captions import choose
from zoo.data.sampler import Draw, leave_signals_to_the_run
from zoo.errors import UserError
from zoo.files import write_file

SHARD = 512  # samples in a file
_BATCH = 64  # samples or captions encoded at once, fewer of images that together have more pixels than
_PIXELS = 2**22

Encode = Callable[[Mapping[str, Any]], Mapping[str, Tensor]]  # a batch with "image" -> tensors (b, ...) to keep
EncodeText = Callable[[list[str]], Mapping[str, Tensor]]  # captions -> tensors (b, ...) to keep


class Shard(NamedTuple):
    """One file: its name, and which samples lie in it, in order."""

    name: str
    numbers: Sequence[int]


def plan(groups: Mapping[str, Sequence[int]]) -> list[Shard]:
    """The files for samples that can be stacked within each group.

    Args:
        groups: name -> numbers of samples.
    """
    return [
        Shard(f"{name}-{first // SHARD:05d}.safetensors", numbers[first : first + SHARD])
        for name, numbers in groups.items()
        for first in range(0, len(numbers), SHARD)
    ]


class Latents(Dataset):
    """Encoded samples: {"caption": str, "number": int} and what was kept of each, floats as float32.

    Tensors of images keep their name, those of captions begin with "context.".

    Args:
        folder: where shards lie, made by `fill`.
        shards: which they are; together they hold the samples 0, 1, 2 ...
        seed: decides which of several captions a sample gets.
        count: how many samples are wanted, the first ones; None = all.

    Raises:
        UserError: a shard is missing or damaged.
    """

    def __init__(self, folder: str | Path, shards: Sequence[Shard], *, seed: int = 0, count: int | None = None) -> None:
        self.seed = seed
        self._shards = [_Stored(Path(folder) / shard.name, len(shard.numbers)) for shard in shards]
        self._places = {number: (s, row) for s, shard in enumerate(shards) for row, number in enumerate(shard.numbers)}
        self.count = len(self._places) if count is None else count

    def __len__(self) -> int:
        """Samples."""
        return self.count

    def __getitem__(self, draw: int | Draw) -> dict[str, Any]:
        """Sample of an index, or of a Draw, whose number decides noise and timestep later."""
        index, number = (draw.index, draw.number) if isinstance(draw, Draw) else (draw, draw)
        place, row = self._places[index]
        shard = self._shards[place]
        caption = choose(shard.captions[row], self.seed, number)
        rows = {name: shard.texts[caption] if name.startswith("context.") else row for name in shard.tensors}
        kept = {name: tensor[rows[name]] for name, tensor in shard.tensors.items()}
        kept = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in kept.items()}
        return {**kept, "caption": caption, "number": number}


class _Stored:
    """The contents of one shard: tensors mapped from the file, captions of each sample, row of each caption's text."""

    def __init__(self, path: Path, count: int) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                self.captions: list[list[str]] = json.loads(file.metadata()["captions"])
                self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            self.texts = _texts(self.captions)
            sizes = {name: len(self.texts) if name.startswith("context.") else count for name in self.tensors}
            if len(self.captions) != count or any(len(self.tensors[name]) != size for name, size in sizes.items()):
                raise ValueError(f"it does not hold {count} samples")
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise UserError(f"latents: {path} is missing or damaged ({error}); delete it and run again") from error


def fill(
    folder: str | Path,
    samples: Dataset,
    shards: Sequence[Shard],
    encode: Encode,
    encode_text: EncodeText | None = None,
    *,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Encode samples into shards; those that lie there already are not made again.

    Args:
        folder: of the shards; its name should tell what the encoder and the samples are.
        samples: items with "image", and "caption", a text or several.
        shards: what to make.
        encode: a batch {"image": (b, 3, h, w) in [0, 1]} -> tensors by name; floats are stored in float16.
        encode_text: captions -> tensors by name, which are stored with "context." before it; None = captions alone.
        workers: processes that read samples; 0 = this one.
        progress: called with how many samples are encoded and how many there are.

    Raises:
        UserError: float16 cannot hold a tensor, no space is left, or the place is not writable.
    """
    folder = Path(folder)
    missing = [shard for shard in shards if not (folder / shard.name).is_file()]
    total = sum(len(shard.numbers) for shard in shards)
    done = total - sum(len(shard.numbers) for shard in missing)
    batches = _read(samples, missing, workers)
    for shard in missing:
        captions: list[list[str]] = []
        parts: dict[str, list[Tensor]] = {}
        while len(captions) < len(shard.numbers):
            batch = next(batches)
            captions += [[item["caption"]] if isinstance(item["caption"], str) else item["caption"] for item in batch]
            images = torch.stack([item["image"] for item in batch])
            size = max(1, _PIXELS // images[0, 0].numel())
            for some in images.split(size):
                _keep(parts, encode({"image": some}))
            if progress is not None:
                progress(done + len(captions), total)
        texts = list(_texts(captions))
        for first in range(0, len(texts) if encode_text else 0, _BATCH):
            assert encode_text is not None
            encoded = encode_text(texts[first : first + _BATCH])
            _keep(parts, {f"context.{name}": tensor for name, tensor in encoded.items()})
        tensors = {name: torch.cat(some) for name, some in parts.items()}
        done += len(captions)
        if not (folder / shard.name).is_file():  # another process may have made it meanwhile
            write_file(folder / shard.name, save(tensors, {"captions": json.dumps(captions)}), force=True)


def _read(samples: Dataset, shards: Sequence[Shard], workers: int) -> Iterator[list[Any]]:
    """Samples in the order of the shards, in batches that end where a shard ends."""
    batches = [s.numbers[first : first + _BATCH] for s in shards for first in range(0, len(s.numbers), _BATCH)]
    loader = DataLoader(
        samples,
        batch_sampler=batches,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=leave_signals_to_the_run,
        generator=torch.Generator().manual_seed(0),  # the global one stays as it is
    )
    return iter(loader)


def _texts(captions: Sequence[Sequence[str]]) -> dict[str, int]:
    """The row of each different caption."""
    return {text: row for row, text in enumerate(dict.fromkeys(text for each in captions for text in each))}


def _keep(parts: dict[str, list[Tensor]], encoded: Mapping[str, Tensor]) -> None:
    for name, tensor in encoded.items():
        stored = tensor.detach().cpu()
        if stored.is_floating_point():
            stored = stored.half()
            if not stored.isfinite().all():
                raise UserError(f"latents: float16 cannot hold {name} of this encoder; remove data.init_args.cache")
        parts.setdefault(name, []).append(stored.contiguous())
