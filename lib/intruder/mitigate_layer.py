"""Scale the intruder dimensions of an adapter: W + (lambda - 1) u sigma v^T, exactly, in the same kind."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace

import torch

from .edit import CONTROLS, RANKS, WHICH, Plan, check_choice, check_scale, grow, keep, low_rank_norm, plan
from .errors import InputError
from .intruders import check_epsilon, check_k
from .leading import basis_for, examine
from .spectrum import LowRank


@dataclass(frozen=True)
class Settings:
    """How to mitigate: lambda, which intruders, which control instead, what rank, how often; checked when made."""

    scale: float
    which: str = "top"
    control: str | None = None
    rank: str = "grow"
    k: int = 10
    epsilon: float = 0.5
    rounds: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_scale(self.scale))
        object.__setattr__(self, "epsilon", check_epsilon(self.epsilon))
        object.__setattr__(self, "k", check_k(self.k))
        check_choice("which", self.which, WHICH)
        check_choice("control", self.control, CONTROLS, optional=True)
        check_choice("rank", self.rank, RANKS)
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise InputError(f"rounds={self.rounds!r} was given; wanted a whole number >= 1")


@dataclass(frozen=True)
class Layer:
    """One adapted matrix: W0 (out, in), the update s B A, and DoRA's magnitude (out,) or None."""

    name: str
    pretrained: torch.Tensor
    update: LowRank
    magnitude: torch.Tensor | None = None

    def tuned(self) -> LowRank | torch.Tensor:
        """What W is: the low-rank update of W0, or with DoRA the dense matrix diag(m / |V|_rows) V, V = W0 + s B A."""
        if self.magnitude is None:
            return self.update
        V, norms = self.direction()
        return (self.magnitude / norms)[:, None] * V

    def direction(self) -> tuple[torch.Tensor, torch.Tensor]:
        """DoRA's V = W0 + s B A in float32 and the norms of its rows."""
        V = self.pretrained + self.update.scale * (self.update.B @ self.update.A)
        return V, torch.linalg.vector_norm(V, dim=1)


@dataclass
class Outcome:
    """What became of one matrix; `update` and `magnitude` are the objects that came in where nothing was edited."""

    name: str
    update: LowRank
    magnitude: torch.Tensor | None
    edited: bool = False
    facts: dict = field(default_factory=dict)


def mitigate_layer(layer: Layer, settings: Settings, store=None) -> Outcome:
    """Edit one adapted matrix by `settings` and count again; `facts` holds the numbers of mitigation.json.

    With W = sum_j sigma_j u_j v_j^T and I the chosen intruders among the leading k, the result is W + (lambda - 1)
    sum_{i in I} u_i sigma_i v_i^T, or a control (`edit.plan`). `rank` "grow": exact, rank r + |I| a round. "keep": the
    best approximation of rank r; `discarded` is |exact - kept|_F / |edit|_F of the last round. DoRA: with D =
    diag(|V|_i / m_i) the row scaling, V + D E has the direction of every row of W + E, and the magnitude becomes the
    length of its rows: exact as well, with a new magnitude.

    `rounds` > 1 repeats on the result while intruders are left, so a round scales what the last one has scaled; use it
    with lambda = 0. lambda = 1 and no intruder give back the very objects that came in.
    Raises InputError for k above min(out, in), and where no factor can carry the edit, naming the matrix.
    """
    current, steps, lost, after, start = layer, [], 0.0, None, None
    basis = basis_for(layer.pretrained, store)
    depth = min(2 * settings.k if settings.control == "neighbour" else settings.k, *layer.pretrained.shape)
    try:
        for _ in range(settings.rounds):
            intruder, vectors, start = examine(
                current.pretrained, current.tuned(), max(depth, settings.k), settings.epsilon, basis, start
            )
            if not steps:
                before = int(intruder[: settings.k].sum())
            step = plan(
                vectors,
                intruder,
                _update_norm(current),
                settings.scale,
                settings.k,
                settings.which,
                settings.control,
                layer.name,
                settings.seed + len(steps),
            )
            if step is None:
                after = int(intruder[: settings.k].sum())
                break
            current, lost = _edited(current, step, int(layer.update.B.shape[1]) if settings.rank == "keep" else None)
            steps.append(step)
        if after is None:
            found = examine(current.pretrained, current.tuned(), settings.k, settings.epsilon, basis, start, False)
            after = int(found.intruder.sum())
    except InputError as error:
        raise InputError(str(error) if layer.name in str(error) else f"{layer.name}: {error}") from error
    facts = {
        "name": layer.name,
        "shape": list(layer.pretrained.shape),
        "before": before,
        "after": after,
        "rounds": len(steps),
        "edited": [[j + 1 for j in step.indices] for step in steps],
        "factor": [step.factor for step in steps],
        "rank_before": int(layer.update.B.shape[1]),
        "rank_after": int(current.update.B.shape[1]),
        "edit_norm": [step.norm for step in steps],
        "update_norm": _update_norm(layer),
        "discarded": lost,
    }
    return Outcome(layer.name, current.update, current.magnitude, bool(steps), facts)


def _edited(layer: Layer, step: Plan, rank: int | None) -> tuple[Layer, float]:
    """(the edited layer, |exact - kept|_F / |edit|_F); `rank` cuts the update, None keeps it exact."""
    exact = _exact(layer, step)
    if rank is None or exact.update.B.shape[1] <= rank:
        return exact, 0.0
    cut, lost = keep(exact.update, rank)
    if exact.magnitude is None:
        return replace(exact, update=cut), lost / step.norm
    # Row i of the tuned matrix is row i of V times a factor that stays; its length is the new magnitude.
    factor = exact.magnitude / exact.direction()[1]
    kept = replace(exact, update=cut)
    kept = replace(kept, magnitude=factor * kept.direction()[1])
    return kept, float(torch.linalg.matrix_norm(exact.tuned() - kept.tuned())) / step.norm


def _exact(layer: Layer, step: Plan) -> Layer:
    """The layer with this edit and no approximation."""
    B, A, scale = layer.update
    if layer.magnitude is None:
        update = LowRank(step.factor * B, A, scale) if step.added is None else grow(layer.update, step.added)
        return replace(layer, update=update)
    V, norms = layer.direction()
    rows = layer.magnitude / norms
    if not bool((rows != 0).all() and torch.isfinite(rows).all()):
        raise InputError("a row of DoRA's magnitude or of W0 + s B A is zero; wanted rows that are not, to edit them")
    if step.added is not None:
        target = rows[:, None] * V + step.added.B @ step.added.A
        update = grow(layer.update, step.added._replace(B=step.added.B / rows[:, None]))
        return replace(layer, update=update, magnitude=rows.sign() * torch.linalg.vector_norm(target, dim=1))
    # W0 + c (W - W0) = diag(g) (W0 + diag(c rows / g) s B A) with g = 1 - c + c rows.
    g = 1 - step.factor + step.factor * rows
    if not bool((g != 0).all()):
        raise InputError("the norm-matched control makes a row of DoRA vanish; wanted another lambda")
    shrunk = replace(layer, update=LowRank((step.factor * rows / g)[:, None] * B, A, scale))
    return replace(shrunk, magnitude=g * shrunk.direction()[1])


def _update_norm(layer: Layer) -> float:
    if layer.magnitude is None:
        return low_rank_norm(layer.update)
    return float(torch.linalg.matrix_norm(layer.tuned() - layer.pretrained))


def total_facts(settings: Settings, facts: list[dict], left: list[str]) -> dict:
    """What mitigation.json and the result of `mitigate_model` hold: settings, totals, and the facts of each matrix."""
    return {
        "schema": 1,
        **asdict(settings),
        "matrices_edited": sum(bool(fact["edited"]) for fact in facts),
        "total_before": sum(fact["before"] for fact in facts),
        "total_after": sum(fact["after"] for fact in facts),
        "left_as_they_are": left,
        "matrices": facts,
    }


def pattern_key(module: str) -> str:
    """The key of rank_pattern and alpha_pattern that matches this module and no other."""
    return "^" + re.escape(module)


def tidy(alpha: float) -> float | int:
    """alpha as a whole number where it is one, so that alpha / r gives the scale back exactly."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(abs(alpha), 1) else alpha
