"""Watch intruder dimensions appear while a model trains: a callback for `train.fit` that costs next to nothing."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping

import pandas as pd
import torch

from .errors import InputError
from .intruders import check_epsilon, check_k
from .layout import counted_views
from .mitigate_loaded import PLAIN, read_layer
from .peft_layers import lora_layers
from .spectrum import svd

COLUMNS = ("step", "loss", "matrix", "index", "singular_value", "max_cosine", "intruder", "borderline")
MARGIN = 6  # vectors iterated beyond k, so that the k-th converges at the gap to the (k + 7)-th
TOLERANCE = 1e-3  # residual of an accepted vector, as a share of its singular value
MOST_PASSES = 20


class IntruderCallback:
    """Call it after every step: `fit(..., on_step=IntruderCallback(every=50))`, or `run_config(config, on_step=...)`.

    Every `every` steps (and at step 1) it finds the k leading singular values sigma_j and left vectors u_j of each
    watched matrix W and m_j = max_i |<x_i, u_j>| over all left singular vectors x_i of W0, and keeps them with the
    step's loss. W0 is decomposed once, at the first call. Later checks start from the vectors of the last one: some
    passes of subspace iteration with a Rayleigh-Ritz step, until each residual |W v_j - sigma_j u_j| and |W^T u_j -
    sigma_j v_j| is below 1e-3 sigma_j, and a full decomposition where that is not reached in 20 passes. So a live count
    is a close estimate, good to the residual over the gap between singular values: where m_j is that close to epsilon
    the vector is marked `borderline`. The gaps are estimates too; `intruder audit` decides.

    On a nano LoRA run (24 matrices, one CPU thread) the checks took 2.3 % of the training time at every=50 and 7.7 % at
    every=10; tests/benchmarks/live_callback.py measures it.

    W0 is the frozen weight for LoRA, rsLoRA and DoRA. For full fine-tuning, PiSSA and the like give `base_state`, the
    state dict of the base from before training. `include` watches only matrices whose name it finds (`re.search`).

    Attributes: `frame()`, `counts()`; `seconds` spent in checks, `setup_seconds` at the first call, and `share`, the
    part of the time since the first call (set-up left out) that checks took.
    """

    def __init__(
        self,
        every: int = 50,
        k: int = 10,
        epsilon: float = 0.5,
        base_state: Mapping[str, torch.Tensor] | None = None,
        include: str | None = None,
    ):
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every={every!r} was given; wanted a whole number of steps >= 1, for example every=50")
        try:
            self._include = re.compile(include) if include is not None else None
        except re.error as error:
            raise InputError(
                f"include={include!r} is no regular expression ({error}); wanted one such as 'query'"
            ) from error
        self.every, self.k, self.epsilon = every, check_k(k), check_epsilon(epsilon)
        self.base_state = base_state
        self.seconds = self.setup_seconds = 0.0
        self._rows: list[dict] = []
        self._bases: dict[str, torch.Tensor] = {}
        self._last: dict[str, torch.Tensor] = {}
        self._began = self._now = 0.0

    def __call__(self, step: int, loss: float, model: torch.nn.Module) -> None:
        """Check if it is time to: `step` counts from 1."""
        self._now = start = time.perf_counter()
        if not self._bases:
            self._set_up(model)
            self.setup_seconds = time.perf_counter() - start
            self._began = start = time.perf_counter()
            step_is_due = True
        else:
            step_is_due = step % self.every == 0
        if step_is_due:
            with torch.no_grad():
                for name, W in self._tuned(model):
                    self._check(step, loss, name, W)
            self.seconds += time.perf_counter() - start
        self._now = time.perf_counter()

    @property
    def share(self) -> float:
        """Seconds in checks as a share of all seconds since the first call, set-up left out; 0 before."""
        elapsed = self._now - self._began
        return self.seconds / elapsed if self._bases and elapsed > 0 else 0.0

    def frame(self) -> pd.DataFrame:
        """Everything seen: columns step, loss, matrix, index (1-based j), singular_value, max_cosine, intruder,
        borderline."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def counts(self) -> pd.DataFrame:
        """Intruders over all watched matrices at each check: columns step, loss, count."""
        frame = self.frame()
        grouped = frame.groupby(["step", "loss"], as_index=False)["intruder"].sum()
        return grouped.rename(columns={"intruder": "count"}).astype({"count": int})

    def _set_up(self, model: torch.nn.Module) -> None:
        bases = {}
        with torch.no_grad():
            for name, W in self._base(model):
                if self._include is None or self._include.search(name):
                    if self.k > min(W.shape):
                        raise InputError(
                            f"k={self.k} and {name} of shape {tuple(W.shape)} has {min(W.shape)} singular "
                            "vectors; wanted a smaller k, or to leave it out with include=..."
                        )
                    spectrum = svd(W)
                    bases[name] = spectrum.U
                    self._last[name] = spectrum.U[:, : self.k + MARGIN]
        if not bases:
            raise InputError("no matrix to watch; wanted counted matrices whose name `include` finds")
        self._bases = bases

    def _base(self, model: torch.nn.Module):
        if self.base_state is None:
            adapter = _only_adapter(model)
            initialisation = str(getattr(model.peft_config[adapter], "init_lora_weights", True)) if adapter else ""
            if not adapter or initialisation not in PLAIN:
                raise InputError(
                    "the weights before training are not in this model; wanted IntruderCallback("
                    "base_state=base.state_dict()) with the tensors of the base, cloned before training"
                )
            for layer in lora_layers(model, adapter):
                yield layer.name, read_layer(layer, adapter).pretrained
            return
        watched = {name for name, _ in self._tuned(model, everything=True)}
        kind = getattr(getattr(model, "config", None), "model_type", None)
        shapes = {name: tuple(tensor.shape) for name, tensor in self.base_state.items()}
        for name, view in counted_views(shapes, kind, "base_state").items():
            if name in watched:
                yield name, view.of(self.base_state[view.tensor].detach()).float()

    def _tuned(self, model: torch.nn.Module, everything: bool = False):
        """(name, W) of every watched matrix: float32, shape (out, in)."""
        adapter = _only_adapter(model)
        if adapter:
            for layer in lora_layers(model, adapter):
                if everything or layer.name in self._bases:
                    read = read_layer(layer, adapter)
                    tuned = read.tuned()
                    yield layer.name, tuned if read.magnitude is not None else read.direction()[0]
            return
        state = {name: parameter for name, parameter in model.named_parameters()}
        kind = getattr(getattr(model, "config", None), "model_type", None)
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name, view in counted_views(shapes, kind, "the model").items():
            if everything or name in self._bases:
                yield name, view.of(state[view.tensor].detach()).float()

    def _check(self, step: int, loss: float, name: str, W: torch.Tensor) -> None:
        U, S, error = leading_from(W, self._last[name].to(W), self.k)
        self._last[name] = U
        cosines = (self._bases[name].to(W).mT @ U[:, : self.k]).abs().amax(0).clamp(max=1.0).tolist()
        for j, (sigma, cosine, doubt) in enumerate(zip(S[: self.k].tolist(), cosines, error.tolist(), strict=True)):
            self._rows.append(
                {
                    "step": step,
                    "loss": float(loss),
                    "matrix": name,
                    "index": j + 1,
                    "singular_value": sigma,
                    "max_cosine": cosine,
                    "intruder": cosine < self.epsilon,
                    "borderline": abs(cosine - self.epsilon) <= doubt,
                }
            )


def leading_from(W: torch.Tensor, start: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading left singular vectors (m, b) and values (b,) of W, iterated from `start` (m, b) until k have converged.

    Subspace iteration with Rayleigh-Ritz; see `IntruderCallback` for the stopping rule and the fall-back. The third
    part (k,) is about |u_j - y_j| for the true y_j: sqrt(2) residual_j / gap_j, the gap between the values found.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(start.shape, generator=generator).to(W) / start.shape[0] ** 0.5
    # A direction that grows must not be missing from the start: a little of everything is added.
    Q = torch.linalg.qr(start + 0.05 * noise).Q
    for _ in range(MOST_PASSES):
        Q = torch.linalg.qr(W @ (W.mT @ Q)).Q
        V, S, Eh = torch.linalg.svd(W.mT @ Q, full_matrices=False)
        U = Q @ Eh.mT
        residual = torch.linalg.vector_norm(W @ V[:, :k] - U[:, :k] * S[:k], dim=0)
        if bool((residual <= TOLERANCE * S[:k]).all()):
            return U, S, _doubt(residual, S)
    full = svd(W)
    b = start.shape[1]
    rounding = 16 * torch.finfo(W.dtype).eps * full.S[0]
    return full.U[:, :b], full.S[:b], _doubt(rounding.expand(k), full.S)


def _doubt(residual: torch.Tensor, S: torch.Tensor) -> torch.Tensor:
    k = len(residual)
    steps = S[:k] - torch.cat([S[1 : k + 1], S.new_zeros(1)])[:k]
    gap = torch.minimum(steps, torch.cat([steps.new_full((1,), torch.inf), steps[:-1]]))
    return (2**0.5 * residual / gap.clamp(min=1e-30)).clamp(max=1.0)


def _only_adapter(model: torch.nn.Module) -> str | None:
    if not getattr(model, "peft_config", None):
        return None
    active = list(model.active_adapters)
    if len(active) != 1:
        raise InputError(f"{len(active)} adapters are active; wanted one while training")
    return active[0]
