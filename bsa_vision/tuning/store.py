"""The state of a calibration, and the statistics file that stores it."""

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
UNSIGNED = "0" * 64  # placeholder of the digest while the digest is computed
SECONDS = 5.0  # shortest time between two saves
PART = 0.05  # largest share of the time that is spent on saving
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # raised by parsing


@dataclass
class Calibration:
    """Sums over the images done so far, and the weights of the layers measured so far.

    identity    what the statistics depend on: model, weights, images, options
    witness     size and norm of the target of the first image; tells targets of one name apart
    orders      loss of each token order, if orders were compared
    compared    [layer]: (H, R, K) blocks of each row that are compared with each other
    blocks      sums of pass 1, [half of the images * layers + layer]; emptied when pass 1 is done
    dropping    result of pass 1, [layer]: (1 + halves, H, R, C) `order_of_dropping` from all images
                and, for each half, from the other half
    totals      [layer]: () squared norm of the dense output
    candidates  sums of pass 2, [layer]
    weights     errors of the target for some images, per skipped layer; all layers together last
    done        number of images that each pass has seen
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
        """Return the parts of a safetensors file; its metadata contain a digest of the rest."""
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
        """Read a file that `dumps` wrote; raise PlanError for any other file or version."""
        from safetensors import SafetensorError, safe_open

        try:
            _check_digest(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._from_parts(tensors, json.loads(metadata["about"]))
        except (SafetensorError, *UNREADABLE) as error:
            raise PlanError(
                f"{path} holds no statistics that this version can read ({error}): pass another "
                "file, or delete this one to start again."
            ) from None

    @classmethod
    def _from_parts(cls, tensors: dict[str, Tensor], about: dict[str, Any]) -> Calibration:
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
    """Return the offset of the tensors in a safetensors file."""
    return 8 + int.from_bytes(data[:8], "little")


def _digest_of(data: memoryview | mmap.mmap, start: int) -> str:
    """Return the SHA-256 of a file whose digest, at `start`, is replaced by `UNSIGNED`."""
    sha = hashlib.sha256(data[:start])
    sha.update(UNSIGNED.encode())
    sha.update(memoryview(data)[start + len(UNSIGNED) :])
    return sha.hexdigest()


def _check_digest(path: Path) -> None:
    """Raise ValueError if the file is of another format or version, or was changed."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = data[: _header_end(data)]
        metadata = json.loads(header[8:])["__metadata__"]
        if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
            raise ValueError(
                f"format {metadata.get('format')!r}, version {metadata.get('version')!r}"
            )
        if _digest_of(data, header.index(metadata["digest"].encode())) != metadata["digest"]:
            raise ValueError("the file was changed after it was written")


def _sums(kind: Any, prefix: str, tensors: Mapping[str, Tensor]) -> list[Any]:
    """Return the sums that `Calibration.dumps` stored under `prefix`."""
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        start, index, attribute = name.split(".")
        if start == prefix:
            found.setdefault(int(index), {})[attribute] = tensor
    return [kind(**found[index]) for index in sorted(found)]


class Store:
    """The statistics file of a calibration, written by rank 0; path None = nothing is saved."""

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None and (
            self.path.is_dir() or not self.path.resolve().parent.is_dir()
        ):
            raise ValueError(f"statistics={str(path)!r}: expected a file in an existing directory.")
        self.next = time.monotonic() + SECONDS
        self.saved: dict[str, int] | None = None  # images per pass in the file

    @property
    def interrupted(self) -> str:
        """Text for an interrupted run: what the file holds and how to continue."""
        if self.path is None:
            return "nothing was saved; pass statistics=PATH to save the statistics"
        if self.saved is None:
            return f"nothing was saved in {self.path} yet"
        passes = ", ".join(
            f"{count} images of pass {n}" for n, count in enumerate(self.saved.values(), 1)
        )
        return (
            f"{self.path} holds {passes}; continue with statistics={str(self.path)!r}, resume=True"
        )

    def open(self, identity: Mapping[str, Any], resume: bool) -> Calibration:
        """Return the calibration in the file of rank 0, or an empty one if there is no file.

        Raise FileExistsError if there is a file and `resume` is False, and ValueError if the file
        belongs to another run.
        """
        found: Calibration | Exception | None = None
        if distributed.rank_and_size()[0] == 0:
            try:
                found = self._open(identity, resume)
            except (ValueError, OSError) as error:
                found = error
        found = distributed.broadcast(found)
        if isinstance(found, Exception):
            raise found
        assert found is not None
        return found

    def _open(self, identity: Mapping[str, Any], resume: bool) -> Calibration:
        if self.path is None or not self.path.exists():
            return Calibration(identity)
        if not resume:
            raise FileExistsError(
                f"{self.path} already exists: pass resume=True (--resume) to continue from its "
                "statistics, for any budget, or delete the file."
            )
        found = Calibration.load(self.path)
        differences = [
            f"{name} {found.identity.get(name)!r} instead of {value!r}"
            for name, value in identity.items()
            if found.identity.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{self.path} holds statistics of another run: {', '.join(differences)}; pass "
                "another file or delete it."
            )
        self.saved = dict(found.done)
        return found

    def save(self, calibration: Calibration, now: bool = False) -> None:
        """Save every few seconds, or `now`.

        If the file cannot be written, warn and continue without saving.
        """
        start = time.monotonic()
        if self.path is None or distributed.rank_and_size()[0] or (not now and start < self.next):
            return
        try:
            atomic_write.write(self.path, *calibration.dumps())
            self.saved = dict(calibration.done)
        except OSError as error:
            warnings.warn(
                f"statistics could not be saved to {self.path} ({error}): tuning continues without "
                "saving; the last saved version is kept.",
                RuntimeWarning,
                stacklevel=2,
            )
            self.path = None
        end = time.monotonic()
        self.next = end + max(SECONDS, (end - start) / PART)


def digest(items: Iterable[Any]) -> str:
    """Return a digest of the items: contents of tensors and arrays, nested or not, else `repr`."""
    sha = hashlib.sha256()
    for item in items:
        if isinstance(item, Tensor):
            sha.update(f"{tuple(item.shape)} {item.dtype}".encode())
            if item.is_meta:
                continue
            if item.is_quantized:
                item = item.dequantize()
            if hasattr(item, "__tensor_flatten__"):  # a tensor subclass made of other tensors
                names, how = item.__tensor_flatten__()
                sha.update(digest([how, *(getattr(item, name) for name in names)]).encode())
                continue
            sha.update(item.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        elif hasattr(item, "__array_interface__"):  # numpy arrays, Pillow images
            sha.update(digest([torch.from_numpy(np.array(item))]).encode())
        elif isinstance(item, Mapping):
            sha.update(digest(x for pair in item.items() for x in pair).encode())
        elif isinstance(item, (list, tuple)):
            sha.update(digest(item).encode())
        else:
            sha.update(repr(item).encode())
    return sha.hexdigest()[:16]
