"""What `solvers.py` compares with: torchjd's weightings, and LibMTL's where it is installed.

Every solver gets one block's rows and Gramian and returns weights [K] or a direction [N]. Blocks have solvers of their
own, made outside of the timing, since some keep state.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from _solvers_cases import above
from torch import Tensor

Solve = Callable[[Tensor, Tensor], Tensor]  # rows [K, N], Gramian [K, K] -> weights [K] or direction [N]


@dataclass(frozen=True)
class Peer:
    """One method elsewhere.

    Attributes:
        make: a solver for K objectives, from torchjd's aggregation package, K, and our options.
        needs: modules beyond torchjd and what this project has.
        note: for the reader, where it is not simply torchjd's method of that name.
    """

    make: Callable[[Any, int, Mapping[str, Any]], Solve]
    needs: tuple[str, ...] = ()
    note: str = ""


def _of_gram(weighting: Callable[[Tensor], Tensor]) -> Solve:
    return lambda rows_KN, gram_KK: weighting(gram_KK)


def _of_rows(weighting: Callable[[Tensor], Tensor]) -> Solve:
    return lambda rows_KN, gram_KK: weighting(rows_KN)


class _ScipyProjector:
    """torchjd's default projector with its trace scaling and its 1e-4 on the diagonal, the program solved by scipy."""

    def __call__(self, lower: Tensor, gram_KK: Tensor) -> Tensor:
        gram = (gram_KK / gram_KK.trace() + 1e-4 * torch.eye(len(gram_KK), dtype=gram_KK.dtype)).numpy()
        solutions = [torch.from_numpy(above(gram, row.numpy())) for row in lower.reshape(-1, len(gram_KK))]
        return torch.stack(solutions).reshape(lower.shape)


_QUADPROG = ("quadprog", "qpsolvers")
_SCIPY_NOTE = "with scipy's nnls as its QP solver (torchjd's own, quadprog, is GPL and not installed)"

# Our name -> torchjd's counterparts; the first one whose needs are met is measured. None: torchjd has none.
TORCHJD: dict[str, tuple[Peer, ...] | None] = {
    "mean": (Peer(lambda jd, k, o: _of_gram(jd.MeanWeighting())),),
    "mgda": (Peer(lambda jd, k, o: _of_gram(jd.MGDAWeighting())),),
    "pcgrad": (Peer(lambda jd, k, o: _of_gram(jd.PCGradWeighting())),),
    "cagrad": (Peer(lambda jd, k, o: _of_gram(jd.CAGradWeighting(c=o["c"])), ("cvxpy", "clarabel")),),
    "gradvac": (Peer(lambda jd, k, o: _of_gram(jd.GradVacWeighting(beta=o["beta"]))),),
    "upgrad": (
        Peer(lambda jd, k, o: _of_gram(jd.UPGradWeighting()), _QUADPROG),
        Peer(lambda jd, k, o: _of_gram(jd.UPGradWeighting(projector=_ScipyProjector())), note=_SCIPY_NOTE),
    ),
    "dualproj": (
        Peer(lambda jd, k, o: _of_gram(jd.DualProjWeighting()), _QUADPROG),
        Peer(lambda jd, k, o: _of_gram(jd.DualProjWeighting(projector=_ScipyProjector())), note=_SCIPY_NOTE),
    ),
    "nash-mtl": (
        Peer(lambda jd, k, o: _of_rows(jd.NashMTL(k).weighting), ("cvxpy", "ecos")),
        Peer(
            lambda jd, k, o: _of_gram(jd.FairGradWeighting(alpha=1.0)),
            note="as FairGrad with alpha = 1, the same equations (torchjd's NashMTL needs ecos, which is GPL)",
        ),
    ),
    "fairgrad": (Peer(lambda jd, k, o: _of_gram(jd.FairGradWeighting(alpha=o["alpha"]))),),
    "imtl-g": (Peer(lambda jd, k, o: _of_gram(jd.IMTLGWeighting())),),
    "config": (Peer(lambda jd, k, o: _of_rows(jd.ConFIG()), note="from the rows, 2K + 8 elements each"),),
    "aligned-mtl": (Peer(lambda jd, k, o: _of_gram(jd.AlignedMTLWeighting())),),
    "random": (Peer(lambda jd, k, o: _of_rows(jd.RandomWeighting())),),
    "famo": None,
    "dwa": None,
}


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def torchjd_peer(method: str) -> Peer | str:
    """torchjd's counterpart that can be measured here, or why there is none."""
    peers = TORCHJD.get(method)
    if peers is None:
        return "none"
    if not _installed("torchjd"):
        return "needs torchjd"
    for peer in peers:
        if all(map(_installed, peer.needs)):
            return peer
    return "needs " + ", ".join(module for module in peers[0].needs if not _installed(module))


def torchjd_maker(method: str, options: Mapping[str, Any]) -> tuple[Callable[[int], Solve] | None, str]:
    """How to make a solver for K objectives (None if impossible), and a note or the reason."""
    peer = torchjd_peer(method)
    if isinstance(peer, str):
        return None, peer
    package = importlib.import_module("torchjd.aggregation")
    return lambda k: peer.make(package, k, options), peer.note


# Our name -> module and class of LibMTL. Its methods compute gradients themselves; the adapter hands them ours.
LIBMTL = {
    "mean": "EW",
    "mgda": "MGDA",
    "pcgrad": "PCGrad",
    "cagrad": "CAGrad",
    "gradvac": "GradVac",
    "imtl-g": "IMTL",
    "aligned-mtl": "Aligned_MTL",
    "nash-mtl": "Nash_MTL",
}


class _Given:
    """Mixed in before a LibMTL weighting: gradients come from outside, the combined one stays here."""

    def _compute_grad_dim(self) -> None:
        self.grad_dim = self.given.shape[1]
        self.grad_index = [self.grad_dim]

    def _compute_grad(self, losses: Tensor, mode: str, rep_grad: bool = False) -> Tensor:
        return self.given

    def _reset_grad(self, new_grads: Tensor) -> None:
        self.combined = new_grads


class LibMTL:
    """LibMTL's weightings, from wherever ``import LibMTL`` would find them.

    Only the modules of its weightings are loaded: the package itself imports models for images, and with them a
    version of torchvision that is long gone.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        spec = importlib.util.find_spec("LibMTL")
        self.found = spec is not None
        self.how = "not installed"
        if not self.found:
            return
        try:
            version = importlib.metadata.version("LibMTL")
        except importlib.metadata.PackageNotFoundError:
            version = "unknown version"
        self.how = f"{version} in {spec.submodule_search_locations[0]}, modules of its weightings alone"
        for name in ("LibMTL", "LibMTL.weighting"):
            package = types.ModuleType(name)
            package.__path__ = [place + name[6:].replace(".", "/") for place in spec.submodule_search_locations]
            sys.modules[name] = package

    def maker(self, method: str, options: Mapping[str, Any]) -> Callable[[int], Solve] | None:
        """How to make a solver for K objectives; None, and ``reasons[method]``, if that is impossible."""
        name = LIBMTL.get(method)
        if not self.found or name is None or name == "EW":  # EW is no more than a sum of losses
            return None
        try:
            base = getattr(importlib.import_module(f"LibMTL.weighting.{name}"), name)
        except (ImportError, AttributeError) as error:
            self.reasons[method] = f"LibMTL's {name} cannot be loaded: {error}"
            return None
        # Every release has names of its own for the options; a method takes those it knows.
        named = {"mgda_gn": "none", "beta": options.get("beta", 0.5), "GradVac_beta": options.get("beta", 0.5)}
        named |= {"GradVac_group_type": 0, "calpha": options.get("c", 0.4), "rescale": 2}
        named |= {"update_weights_every": 1, "optim_niter": 20, "max_norm": 1}
        return lambda k: self._solver(base, k, named)

    @staticmethod
    def _solver(base: type, objectives: int, options: Mapping[str, Any]) -> Solve:
        method = type("Given" + base.__name__, (_Given, base), {})()
        method.task_num, method.device, method.rep_grad = objectives, torch.device("cpu"), False
        method.init_param()
        losses = torch.ones(objectives)

        def solve(rows_KN: Tensor, gram_KK: Tensor) -> Tensor:
            method.given = rows_KN.float()  # its vectors are float32
            method.backward(losses, **options)
            return method.combined.detach()

        return solve
