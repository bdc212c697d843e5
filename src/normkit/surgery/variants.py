"""A model that knows nothing of norms as one variant of a comparison: the norm of the variant, wherever one belongs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast

from normkit.core.catalog import CATALOG, STANDARD
from normkit.core.record import NormRecord
from normkit.errors import NormValueError, message
from normkit.frameworks import framework_of
from normkit.surgery.conversion import write
from normkit.surgery.insertion import insert
from normkit.surgery.protocol import opened, porting
from normkit.surgery.replacement import remove, replace, turned

__all__ = ["normalized"]


def normalized(
    network: Any,
    name: str,
    kind: str,
    norm: Callable[..., Any] | None,
    like: Callable[[NormRecord, int | None], Any],
    *,
    position: str,
    example: Callable[[], Any] | None,
    inplace: bool,
) -> Any:
    """A network with the norm of a variant: in place of the norms it has, else where activations follow its maps.

    Args:
        network: that a function of the user's returned, of PyTorch or Keras.
        name: of the function.
        kind: short name of the norm of the variant, or `none`.
        norm: a function from the number of channels to the norm of the variant; None for no norm.
        like: gives that norm, built, for what another one stood for: by its record and the number of axes of what it
            takes, None where that is not known.
        position: `before` or `after` the activation.
        example: gives inputs of the network.
        inplace: whether the network itself may be changed.

    Raises:
        NormValueError: where this norm has a formula of its own and would have to take the place of a norm or of an
            activation; where a norm of the network cannot be replaced, or has to stand behind an activation.
    """
    subject = opened("replacement", network, None, frameworks=("torch", "keras"))
    special = kind not in ("none", *STANDARD)
    if special and (subject.sites or CATALOG[kind].activates):
        must = f"{kind} must be given its place by {name}: it does not stand where other norms do"
        raise NormValueError(message(must, type(network).__name__, f"def {name}(norm): ... norm(64, activation) ..."))
    if not subject.sites:
        if norm is None:
            return network
        assert example is not None
        placement = cast(Literal["before", "after"], position)
        return insert(network, norm, example(), placement=placement, inplace=inplace)
    hint = f"def {name}(norm): ... and norm(64) in their place"
    if position == "after":
        must = "a norm after the activations needs a model without norms, whose own keep their places"
        raise NormValueError(message(must, type(network).__name__, hint))

    def in_place_of(path: str) -> Callable[[NormRecord], Any]:
        return lambda record: _with_values_of(record, like(record, subject.ndim(path)))

    paths = [site.path for site in subject.sites]
    if norm is None:
        network, report = remove(network, paths, inplace=inplace, return_report=True)
    else:
        new = {path: in_place_of(path) for path in paths}
        network, report = replace(network, new, inplace=inplace, return_report=True)
    for edit in report.kept:
        must = "every norm of a model must be one that can be replaced"
        raise NormValueError(message(must, f"{edit.path}, {edit.old}: {edit.reason}", hint))
    return network


def _with_values_of(record: NormRecord, layer: Any) -> Any:
    """The layer with the gamma and beta of another, which may have reasons for them."""
    side = porting(framework_of(layer))
    own = side.read(layer)
    assert own is not None
    values = turned(record, own.kind)
    write(side, layer, dataclasses.replace(own, gamma=values.gamma, beta=values.beta))
    return layer
