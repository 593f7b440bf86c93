"""What calibration has measured so far, and the file that keeps it."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsa_vision.errors import PlanError
from bsa_vision.masks import TokenLayout
from bsa_vision.storage import atomic_write
from bsa_vision.tuning import distributed
from bsa_vision.tuning.statistics import BlockStatistics, CandidateErrors

FORMAT, VERSION = "bsa-vision/statistics", 4
UNSIGNED = "0" * 64  # where the digest of a file goes, while it is computed
SECONDS = 5.0  # between two savings, at least
PART = 0.05  # of the time is spent on saving, at most


@dataclass
class Calibration:
    """Sums over the first images, as many as `done` says, and the weights of the first layers.

    identity  what the sums are of: the model, its weights, the images, the options
    witness   size and length of the target of the first image: functions have no name that tells them apart
    orders    what each order would lose, where orders were compared
    compared  [layer]: (H, R, K) blocks of each row that are compared with each other
    blocks    of pass 1, [half of the images * layers + layer]; nothing any more once it is complete and best blocks are found
    dropping  what became of them, [layer]: (1 + halves, H, R, C) `order_of_dropping` of all images, and for each half of the others
    totals    [layer]: () squared length of the dense output
    candidates  of pass 2, [layer]
    weights   per layer, and of all together at last: the target's error for each of some images
    """

    identity: Mapping[str, Any]
    layout: TokenLayout | None = None
    witness: list[float] = field(default_factory=list)
    orders: list[dict[str, Any]] = field(default_factory=list)
    compared: list[Tensor] = field(default_factory=list)
    blocks: list[BlockStatistics] = field(default_factory=list)
    dropping: list[Tensor] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)
    candidates: list[CandidateErrors] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=lambda: {"blocks": 0, "candidates": 0})

    def dumps(self) -> tuple[bytes | memoryview, ...]:
        """Return a safetensors file, in parts; its metadata hold a digest of all the rest."""
        from safetensors.torch import save

        tensors = {
            f"{kind}.{index}.{name}": tensor
            for kind, all_sums in (("blocks", self.blocks), ("candidates", self.candidates))
            for index, sums in enumerate(all_sums)
            for name, tensor in sums.tensors().items()
        }
        for name in ("compared", "dropping", "totals"):
            tensors |= {
                f"{name}.{index}": tensor.contiguous()
                for index, tensor in enumerate(getattr(self, name))
            }
        about = {
            "identity": self.identity,
            "layout": None if self.layout is None else asdict(self.layout),
            "witness": self.witness,
            "orders": self.orders,
            "weights": self.weights,
            "done": self.done,
        }
        metadata = {
            "format": FORMAT,
            "version": str(VERSION),
            "about": json.dumps(about),
            "digest": UNSIGNED,
        }
        data = memoryview(save(tensors, metadata))
        start = bytes(data[: _header_end(data)]).index(UNSIGNED.encode())
        signed = _digest_of(data, start).encode()
        return data[:start], signed, data[start + len(signed) :]

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what `dumps` wrote; PlanError for anything else: another version, or any change."""
        from safetensors import SafetensorError, safe_open

        try:
            _check_digest(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._of(tensors, json.loads(metadata["about"]))
        except (
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise PlanError(
                f"{path} holds no statistics that this bsa-vision reads ({error}): give another file, or delete it to start anew."
            ) from None

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Calibration:
        layout = about.pop("layout")
        if layout is not None:
            grid, tile = tuple(layout.pop("grid")), tuple(layout.pop("tile"))
            layout = TokenLayout(grid, tile=tile, **layout)
        lists: dict[str, Any] = {
            name: [
                tensors.pop(f"{name}.{index}")
                for index in range(sum(x.startswith(f"{name}.") for x in tensors))
            ]
            for name in ("compared", "dropping", "totals")
        }
        return cls(
            layout=layout,
            **lists,
            blocks=_sums(BlockStatistics, "blocks", tensors),
            candidates=_sums(CandidateErrors, "candidates", tensors),
            **about,
        )


def _header_end(data: memoryview | mmap.mmap) -> int:
    """Return where the tensors of a safetensors file begin."""
    return 8 + int.from_bytes(data[:8], "little")


def _digest_of(data: memoryview | mmap.mmap, start: int) -> str:
    """Return the SHA-256 of a file's bytes as they are with `UNSIGNED` at `start`."""
    found = hashlib.sha256(data[:start])
    found.update(UNSIGNED.encode())
    found.update(memoryview(data)[start + len(UNSIGNED) :])
    return found.hexdigest()


def _check_digest(path: Path) -> None:
    """Raise ValueError for a file of another kind or version, or one that was changed."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = data[: _header_end(data)]
        metadata = json.loads(header[8:])["__metadata__"]
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise ValueError(
                f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            )
        if _digest_of(data, header.index(metadata["digest"].encode())) != metadata["digest"]:
            raise ValueError("its contents were changed since they were written")


def _sums(kind: Any, prefix: str, tensors: Mapping[str, Tensor]) -> list[Any]:
    """What `Calibration.dumps` wrote of one kind, layer by layer."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        own, index, attribute = name.split(".")
        if own == prefix:
            found.setdefault(int(index), {})[attribute] = tensor
    return [kind(**found[index]) for index in sorted(found)]


class Store:
    """The file of a calibration, written by the first process; None = it is kept in memory only."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and (
            self.path.is_dir() or not self.path.resolve().parent.is_dir()
        ):
            raise ValueError(
                f"statistics={str(path)!r}: expected a file in a folder that is there; give such a path."
            )
        self.next = time.monotonic() + SECONDS
        self.saved: dict[str, int] | None = None  # images of each pass that the file holds

    @property
    def interrupted(self) -> str:
        """Say what is saved, and how to go on from it."""
        if self.path is None:
            return "nothing is saved: give statistics=PATH to keep what is measured"
        if self.saved is None:
            return f"nothing is saved in {self.path} yet"
        passes = ", ".join(
            f"{count} images of pass {n}" for n, count in enumerate(self.saved.values(), 1)
        )
        return f"{self.path} holds {passes}; statistics={str(self.path)!r}, resume=True goes on from there"

    def open(self, identity: Mapping[str, Any], resume: bool) -> Calibration:
        """What is in the first process's file, where one may go on from it; otherwise nothing yet.

        FileExistsError for a file and no `resume`, ValueError for one made of something else.
        """
        found: Calibration | Exception | None = None
        if distributed.rank_and_size()[0] == 0:
            try:
                found = self._open(identity, resume)
            except (ValueError, OSError) as error:
                found = error
        found = distributed.of_the_first(found)
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found

    def _open(self, identity: Mapping[str, Any], resume: bool) -> Calibration:
        if self.path is None or not self.path.exists():
            return Calibration(identity)
        if not resume:
            raise FileExistsError(
                f"{self.path} holds statistics already: resume=True (--resume) goes on from them, for any budget; or delete the file."
            )
        found = Calibration.load(self.path)
        other = [name for name, value in identity.items() if found.identity.get(name) != value]
        if other:
            was = ", ".join(
                f"{name} {found.identity.get(name)!r} instead of {identity[name]!r}"
                for name in other
            )
            raise ValueError(
                f"{self.path} holds statistics of something else: {was}; give another file or delete it."
            )
        self.saved = dict(found.done)
        return found

    def save(self, calibration: Calibration, now: bool = False) -> None:
        """Every few seconds, or now. A file that cannot be written costs a warning, and not what was measured."""
        start = time.monotonic()
        if self.path is None or distributed.rank_and_size()[0] or (not now and start < self.next):
            return
        try:
            atomic_write.write(self.path, *calibration.dumps())
            self.saved = dict(calibration.done)
        except OSError as error:
            warnings.warn(
                f"statistics could not be saved to {self.path} ({error}): tuning goes on without; what was saved before is still there.",
                RuntimeWarning,
                stacklevel=2,
            )
            self.path = None
        end = time.monotonic()
        self.next = end + max(SECONDS, (end - start) / PART)


def digest(items: Iterable[Any]) -> str:
    """Of the contents of tensors, wherever they are in these items."""
    found = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            found.update(f"{tuple(item.shape)} {item.dtype}".encode())
            if item.is_meta:
                continue
            if item.is_quantized:
                item = item.dequantize()
            if hasattr(item, "__tensor_flatten__"):  # a subclass, made of other tensors
                names, how = item.__tensor_flatten__()
                found.update(digest([how, *(getattr(item, name) for name in names)]).encode())
                continue
            found.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif hasattr(item, "__array_interface__"):  # arrays, photographs
            found.update(digest([torch.from_numpy(np.array(item))]).encode())
        elif isinstance(item, Mapping):
            found.update(digest(x for pair in item.items() for x in pair).encode())
        elif isinstance(item, (list, tuple)):
            found.update(digest(item).encode())
        else:
            found.update(repr(item).encode())
    return found.hexdigest()[:16]
