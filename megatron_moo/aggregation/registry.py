"""Names of methods and wrappers, and where methods of others come from.

A method is named by its key in :data:`AGGREGATORS`, by an entry point of the group ``megatron_moo.aggregators`` in any
installed package, or as ``package.module:Class``. All must be subclasses of :class:`Aggregator`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from .aligned import AlignedMTL
from .base import Aggregator, Option
from .cagrad import CAGrad
from .dualproj import DualProj
from .dwa import DWA
from .fairgrad import FairGrad, NashMTL
from .famo import FAMO
from .gradvac import GradVac
from .imtl import IMTLG, ConFIG
from .mean import Mean
from .mgda import MGDA
from .noise_aware import NoiseAware
from .pcgrad import PCGrad
from .random_weights import RandomWeights
from .upgrad import UPGrad
from .wrapper import Wrapper
from .wrappers import Capped, EveryNth, Rescaled, Smoothed

ENTRY_POINTS = "megatron_moo.aggregators"

AGGREGATORS: dict[str, type[Aggregator]] = {
    "mean": Mean,
    "mgda": MGDA,
    "pcgrad": PCGrad,
    "cagrad": CAGrad,
    "gradvac": GradVac,
    "upgrad": UPGrad,
    "dualproj": DualProj,
    "nash-mtl": NashMTL,
    "fairgrad": FairGrad,
    "imtl-g": IMTLG,
    "config": ConFIG,
    "aligned-mtl": AlignedMTL,
    "random": RandomWeights,
    "famo": FAMO,
    "dwa": DWA,
}

# In the order in which they go around a method, innermost first.
WRAPPERS: dict[str, type[Wrapper]] = {
    "noise": NoiseAware,
    "cap": Capped,
    "smooth": Smoothed,
    "rescale": Rescaled,
    "every": EveryNth,
}


def find_aggregator(name: str) -> type[Aggregator]:
    """The class of a method: one of ours, an entry point's, or ``package.module:Class``.

    Raises:
        ValueError: for a name that does not exist, cannot be imported, or is no aggregator.
    """
    if name in AGGREGATORS:
        return AGGREGATORS[name]
    if ":" in name:
        return _checked(name, _import(name, lambda: _attribute(name)))
    foreign = {point.name: point for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    if name in foreign:
        return _checked(name, _import(name, foreign[name].load))
    raise ValueError(
        f"unknown aggregator {name!r}; known: {', '.join([*AGGREGATORS, *sorted(foreign)])}, or package.module:Class"
    )


def _attribute(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module_name), attribute)


def _import(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"aggregator {name!r} cannot be imported ({error}); it must read package.module:Class, with the package "
            "installed or on PYTHONPATH"
        ) from error


def _checked(name: str, found: Any) -> type[Aggregator]:
    if not (isinstance(found, type) and issubclass(found, Aggregator)) or issubclass(found, Wrapper):
        raise ValueError(
            f"aggregator {name!r} is {found!r}; it must be a subclass of megatron_moo.aggregation.Aggregator"
        )
    if found.__abstractmethods__:
        raise ValueError(f"aggregator {name!r} does not define {', '.join(sorted(found.__abstractmethods__))}")
    return found


def build_aggregator(
    name: str, /, *, wrappers: Mapping[str, Mapping[str, float | str]] | None = None, **options: float | str
) -> Aggregator:
    """The method ``name`` with its options, and wrappers around it.

    Args:
        name: see :func:`find_aggregator`.
        wrappers: options by name of the wrapper, e.g. ``{"cap": {"ratio": 2}, "rescale": {}}``. They always go
            around the method in the order of :data:`WRAPPERS`.
        options: the method's.

    Raises:
        ValueError: for a name or option that does not exist, or a value that breaks the option's rule.
    """
    aggregator = find_aggregator(name)(**options)
    wanted = dict(wrappers or {})
    for wrapper, kind in WRAPPERS.items():
        if wrapper in wanted:
            aggregator = kind(aggregator, **wanted.pop(wrapper))
    if wanted:
        raise ValueError(f"unknown wrapper {', '.join(map(repr, wanted))}; known: {', '.join(WRAPPERS)}")
    return aggregator


def aggregator_options(name: str) -> dict[str, Option]:
    """The options of method ``name``, each with its default and help.

    Raises:
        ValueError: for a name that does not exist.
    """
    return dict(find_aggregator(name).options)
