"""Count the intruder dimensions of two local checkpoints, and print the counts as a table."""

from pathlib import Path
from typing import Any

from .errors import InputError
from .intruders import check_epsilon, check_k, count_intruders, max_cosines
from .spectrum import svd, working_precision
from .weights import pair_sources


def count_checkpoints(base_dir: str | Path, tuned_dir: str | Path, k: int = 10, epsilon: float = 0.5) -> dict[str, Any]:
    """Intruder dimensions of a tuned checkpoint, or of a LoRA adapter on its base, matrix by matrix and in total.

    Per matrix #{ j <= k : m_j < epsilon } with m_j = max_i |<x_i, y_j>| over all left singular vectors x_i of the
    pre-trained matrix. Which matrices are counted and which checkpoints are read: see `weights`.

    Returns {"epsilon", "k", "total", "matrices": [{"name", "shape": [out, in], "count", "max_cosine": [m_1..m_k]}]}.
    Raises InputError for epsilon outside (0, 1], k < 1, k above the smallest min(out, in) (the matrix is named), and
    for every checkpoint that `weights.checkpoint_pairs` refuses; settings, names and shapes are checked before any
    matrix is read.

    Source: Algorithm 1 of arXiv 2410.21228.
    """
    epsilon, k = check_epsilon(epsilon), check_k(k)
    sources = pair_sources(base_dir, tuned_dir)
    smallest = min(sources, key=lambda source: min(source.shape))
    if k > min(smallest.shape):
        raise InputError(
            f"k={k} was given and {smallest.name} of shape {smallest.shape} has {min(smallest.shape)} singular "
            "vectors; "
            f"wanted 1 <= k <= {min(smallest.shape)}: add --k {min(10, min(smallest.shape))}"
        )
    matrices = []
    for source in sources:
        pair = source.load()
        before, after = svd(working_precision(pair.pretrained)), svd(working_precision(pair.tuned))
        cosines = max_cosines(before.U.numpy(), after.U[:, :k].numpy())
        matrices.append(
            {
                "name": source.name,
                "shape": list(source.shape),
                "count": count_intruders(cosines, epsilon, k),
                "max_cosine": [float(value) for value in cosines],
            }
        )
    return {"epsilon": epsilon, "k": k, "total": sum(matrix["count"] for matrix in matrices), "matrices": matrices}


def format_table(result: dict[str, Any]) -> str:
    """The result of `count_checkpoints` as text: a line per matrix (name, shape, count, smallest m_j) and the total."""
    rows = [("matrix", "shape", "intruders", "smallest match")]
    for matrix in result["matrices"]:
        shape = " x ".join(str(side) for side in matrix["shape"])
        rows.append((matrix["name"], shape, str(matrix["count"]), f"{min(matrix['max_cosine']):.3f}"))
    rows.append(("total", "", str(result["total"]), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join((row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3)))).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(len(line) for line in lines))
    lines.insert(len(lines) - 1, lines[1])
    number = len(result["matrices"])
    title = f"Intruder dimensions among the {result['k']} leading left singular vectors of each of {number} matrices, "
    return "\n".join([title + f"epsilon = {result['epsilon']:g}", "", *lines])
