"""What is measured on a tuned model: spectra and best matches of every weight pair, and the pseudo-loss."""

import hashlib
from collections.abc import Iterable, Sequence

import pandas as pd
import torch

from .errors import InputError
from .intruders import max_cosines
from .spectrum import Spectrum, above_rounding, effective_rank, svd, working_precision
from .synthetic import random_update
from .weights import MatrixPair

SPECTRA_COLUMNS = ("matrix", "index", "singular_value", "max_cosine", "null_max_cosine")


def measure_pairs(pairs: Iterable[MatrixPair], null_seed: int = 0) -> tuple[pd.DataFrame, list[dict]]:
    """Spectra, best matches, matched null and size of the update for every pair.

    Per matrix W0 -> W = W0 + Delta W of shape (m, p), n = min(m, p): both are decomposed (float64 if n <= 1024, else
    float32), and m_j = max_i |<x_i, y_j>| for j = 1..n over all n vectors x_i. The null repeats this with Delta W
    replaced by N, which has the singular values of Delta W and random directions (`synthetic.random_update`; its seed
    is made from `null_seed` and the name of the matrix).

    Returns (spectra, matrices). `spectra` has the columns matrix, index (1-based j), singular_value (of W), max_cosine,
    null_max_cosine, float32, n rows per matrix. `matrices` lists per matrix: name, shape, effective_rank (of Delta W),
    update_norm and pretrained_norm (Frobenius). An update of zero has effective rank 0 and all m_j = 1. No pairs give
    an empty table and an empty list. Raises InputError for NaN, infinity, or shapes that differ, naming the matrix.

    Source: Algorithm 1 of arXiv 2410.21228; effective rank after Roy and Vetterli 2007.
    """
    tables, matrices = [], []
    for pair in pairs:
        try:
            table, matrix = _measure_pair(pair, null_seed)
        except InputError as error:
            raise InputError(f"matrix {pair.name}: {error}") from error
        tables.append(table)
        matrices.append(matrix)
    spectra = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=list(SPECTRA_COLUMNS))
    types = {"index": "int32"} | dict.fromkeys(SPECTRA_COLUMNS[2:], "float32")
    return spectra.astype(types), matrices


def _measure_pair(pair: MatrixPair, null_seed: int) -> tuple[pd.DataFrame, dict]:
    if pair.pretrained.shape != pair.tuned.shape:
        raise InputError(
            f"pre-trained shape {tuple(pair.pretrained.shape)}, tuned shape {tuple(pair.tuned.shape)}; "
            "wanted the same shape"
        )
    pretrained, tuned = working_precision(pair.pretrained), working_precision(pair.tuned)
    before, after = svd(pretrained), svd(tuned)
    update = tuned - pretrained if pair.update is None else working_precision(pair.update)
    S = above_rounding(svd(update).S, update.shape, stored=None if pair.update is not None else tuned)
    null = torch.from_numpy(random_update(tuple(update.shape), S.cpu().numpy(), matrix_seed(null_seed, pair.name)))
    null_after = svd(pretrained + null.to(pretrained)) if len(S) else before
    table = pd.DataFrame(
        {
            "matrix": pair.name,
            "index": range(1, len(after.S) + 1),
            "singular_value": after.S.cpu().numpy(),
            "max_cosine": _best_matches(before, after),
            "null_max_cosine": _best_matches(before, null_after),
        }
    )
    return table, {
        "name": pair.name,
        "shape": [int(side) for side in pair.tuned.shape],
        "effective_rank": effective_rank(S) if len(S) else 0.0,
        "update_norm": float(torch.linalg.matrix_norm(update)),
        "pretrained_norm": float(torch.linalg.matrix_norm(pretrained)),
    }


def _best_matches(before: Spectrum, after: Spectrum):
    return max_cosines(before.U.cpu().numpy(), after.U.cpu().numpy())


def matrix_seed(null_seed: int, name: str) -> int:
    """The seed of the null of one matrix: the first eight bytes of SHA-256 of '<null_seed>:<name>'."""
    return int.from_bytes(hashlib.sha256(f"{null_seed}:{name}".encode()).digest()[:8], "big")


def pseudo_loss(
    model: torch.nn.Module,
    sequences: Sequence[Sequence[int]],
    mask_id: int,
    special_ids: Iterable[int],
    batch_size: int = 64,
) -> float:
    """Pseudo-loss of a masked language model in nats per token: -(1 / N) sum_x sum_t log P(x_t | x without t).

    Every token of every sequence is masked once, alone, except those in `special_ids`, which stay as context; N is the
    number of masked tokens. `model` is a ...ForMaskedLM; `sequences` hold token ids with their special tokens.
    Sequences of one length are batched together, so there is no padding and the result does not depend on `batch_size`
    beyond rounding. The model runs on its own device in evaluation mode and is left in the mode it came in;
    log-probabilities are float32, their sum float64.

    Raises InputError if there is no token to mask, a sequence is empty, or batch_size < 1.

    Source: Salazar et al. 2020 (pseudo-log-likelihood), with the sign and normalisation of paper.md section 1.5.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size!r} was given; wanted a whole number >= 1")
    special = set(special_ids)
    by_length: dict[int, list[tuple[int, int]]] = {}
    for number, sequence in enumerate(sequences):
        if len(sequence) == 0:
            raise InputError(f"sequence {number} is empty; wanted token ids with at least one token to mask")
        masked = [(number, t) for t, token in enumerate(sequence) if int(token) not in special]
        by_length.setdefault(len(sequence), []).extend(masked)
    count = sum(len(masked) for masked in by_length.values())
    if count == 0:
        raise InputError("the sequences hold no token to mask; wanted at least one token that is not in special_ids")
    device = next(model.parameters()).device
    was_training, total = model.training, 0.0
    model.eval()
    try:
        with torch.inference_mode():
            for _, masked in sorted(by_length.items()):
                for start in range(0, len(masked), batch_size):
                    total -= _masked_log_probability(
                        model, sequences, masked[start : start + batch_size], mask_id, device
                    )
    finally:
        model.train(was_training)
    return total / count


def _masked_log_probability(model, sequences, masked: list[tuple[int, int]], mask_id: int, device) -> float:
    ids = torch.tensor([list(sequences[number]) for number, _ in masked], device=device)
    rows = torch.arange(len(masked), device=device)
    places = torch.tensor([t for _, t in masked], device=device)
    targets = ids[rows, places]
    ids[rows, places] = mask_id
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[rows, places]
    log_probabilities = torch.log_softmax(logits.float(), dim=-1)
    return float(log_probabilities[rows, targets].double().sum())
