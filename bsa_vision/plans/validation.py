"""Check that the parts of a plan fit together, and that a plan fits a model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from bsa_vision.errors import PlanError, nearest
from bsa_vision.plans.model_spec import ModelSpec


def check_fields(
    model: Mapping[str, Any],
    layers: Mapping[str, tuple[str, ...]],
    patterns: Sequence[str],
    others: Sequence[str],
) -> None:
    """Raise PlanError unless layers, heads and pattern names fit together.

    model     the plan's fingerprint (`ModelSpec.fingerprint`)
    patterns  names of the patterns that the plan declares
    others    keys of its scores and notes
    """
    missing = [key for key in ("family", "depth", "heads", "head_dim") if key not in model]
    if missing or not layers:
        raise PlanError(
            f"a plan for model={dict(model)} with {len(layers)} layers: family, depth, heads, "
            "head_dim and at least one layer are needed; start from uniform_plan or dense_plan."
        )
    keys = [*patterns, *layers, *others]
    if "dense" in patterns or not all(isinstance(key, str) for key in keys):
        raise PlanError(
            f"patterns={patterns}, other names={others}: names must be strings, and 'dense' is "
            "reserved; rename the pattern."
        )
    for key, names in layers.items():
        role, _, index = key.rpartition(".")
        number = index.isascii() and index.isdecimal() and str(int(index)) == index
        if not role or not number or int(index) >= model["depth"]:
            raise PlanError(
                f"layer {key!r} is not one of {model['depth']} layers: expected role and index, "
                f"'self.0' to 'self.{model['depth'] - 1}'."
            )
        if len(names) != model["heads"]:
            raise PlanError(
                f"layer {key!r} names {len(names)} heads, the model has {model['heads']}: give one "
                "pattern name per head."
            )
        for name in names:
            if name != "dense" and name not in patterns:
                raise PlanError(
                    f"layer {key!r} uses pattern {name!r}, which is not declared: declared are "
                    f"{', '.join(['dense', *patterns])}."
                )


def check_fit(
    model: Mapping[str, Any], layers: Mapping[str, tuple[str, ...]], spec: ModelSpec
) -> None:
    """Raise PlanError unless a plan for `model` with these layers fits `spec`."""
    wrong = {
        key: (model.get(key), value)
        for key, value in spec.fingerprint.items()
        if model.get(key) != value
    }
    if wrong:
        text = "; ".join(f"{key}: plan {a!r}, model {b!r}" for key, (a, b) in wrong.items())
        raise PlanError(
            f"this plan is for another model ({text}): these must be equal; make a plan for this "
            "model."
        )
    keys = {layer.key for layer in spec.layers}
    unknown = [key for key in layers if key not in keys]
    if unknown:
        raise PlanError(
            f"the plan names layers {unknown}, but the model has {sorted(keys)}: remove or rename "
            "them."
        )
    for layer in spec.layers:
        sparse = sorted({name for name in layers.get(layer.key, ()) if name != "dense"})
        if layer.window and sparse:
            raise PlanError(
                f"layer {layer.key!r} attends within windows of {layer.window} x {layer.window} "
                f"patches, but the plan gives it {', '.join(sparse)}: windowed layers stay dense; "
                "name only global layers: "
                f"{', '.join(other.key for other in spec.layers if not other.window)}."
            )


def check_spec(spec: object) -> None:
    """Raise TypeError unless `spec` is a ModelSpec."""
    if not isinstance(spec, ModelSpec):
        raise TypeError(
            f"spec is a {type(spec).__name__}: expected a ModelSpec; pass bsa.inspect(model)."
        )


def check_keys(
    where: str, data: Mapping[str, Any], allowed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    """Raise PlanError for keys of `data` that are not allowed, or are missing and not optional."""
    unknown = [key for key in data if key not in allowed]
    missing = [key for key in allowed if key not in data and key not in optional]
    if unknown or missing:
        raise PlanError(
            f"{where} has unknown keys {unknown} and lacks {missing}: allowed are "
            f"{', '.join(allowed)}; if a newer bsa-vision wrote the file, update bsa-vision."
        )


def select_layers(
    known: Collection[str], layers: int | str | Iterable[int | str] | None
) -> set[str]:
    """Return the keys in `known` that `layers` names, by key or index; None = all of them."""
    if layers is None:
        return set(known)
    wanted = listed("layers", layers)
    found = [{key for key in known if str(x) in (key, key.rpartition(".")[2])} for x in wanted]
    missing = [x for x, keys in zip(wanted, found, strict=True) if not keys]
    if missing or not wanted:
        raise PlanError(
            f"layers {missing or wanted} match nothing: the plan has {', '.join(known)}"
            f"{nearest(str((missing or [''])[0]), known)}."
        )
    return set().union(*found)


def listed(name: str, given: Any) -> list[Any]:
    """Return one layer or head, or several, as a list."""
    if isinstance(given, (int, str)):
        return [given]
    if not isinstance(given, Iterable):
        kind = "indices or names" if name == "layers" else "indices"
        raise PlanError(f"{name}={given!r}: expected {kind}, one or a list.")
    return list(given)
