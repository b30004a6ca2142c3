"""Slow, obvious versions of the mathematics, written from the published equations: Python numbers and loops.

Nothing here imports Secateur, so that a shared mistake cannot hide. Masks are bool tensors, True = kept.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from decimal import Decimal

import torch
from torch import Tensor


def removed_count(entries: int, sparsity: float) -> int:
    """floor(entries * sparsity), with the sparsity read as the decimal it prints as."""
    return math.floor(Decimal(entries) * Decimal(str(sparsity)))


def magnitude_score(weight: Tensor) -> Tensor:
    """S_ij = |W_ij|, float64."""
    rows = weight.double().tolist()
    return torch.tensor([[abs(value) for value in row] for row in rows], dtype=torch.float64)


def wanda_score(weight: Tensor, x: Tensor) -> Tensor:
    """S_ij = |W_ij| * ||X_j||_2 over all tokens (Wanda, equation 1), float64."""
    tokens = x.double().tolist()
    norms = [math.sqrt(math.fsum(token[j] ** 2 for token in tokens)) for j in range(weight.shape[1])]
    rows = weight.double().tolist()
    return torch.tensor([[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in rows]).double()


def published_running_mean(samples: list[Tensor]) -> list[float]:
    """`scaler_row` of the published code of Wanda: a running mean over samples of each input's sum of squares."""
    s = [0.0] * samples[0].shape[1]
    for n, sample in enumerate(samples):  # the published loop sees one sample at a time, t = 1
        columns = sample.double().t().tolist()
        s = [value * n / (n + 1) for value in s]
        s = [
            value + math.fsum(entry**2 for entry in column) / (n + 1) for value, column in zip(s, columns, strict=True)
        ]
    return s


def _keep(values: list[float], removed: int) -> list[bool]:
    """The mask of one comparison group: a stable ascending sort, and the first `removed` go."""
    order = sorted(range(len(values)), key=lambda position: values[position])  # sorted() is stable
    gone = set(order[:removed])
    return [position not in gone for position in range(len(values))]


def select_rows(score: Tensor, sparsity: float) -> Tensor:
    """In each row the floor(columns * sparsity) lowest go; of equal ones the lower column."""
    removed = removed_count(score.shape[1], sparsity)
    return torch.tensor([_keep(row, removed) for row in score.tolist()])


def select_matrix(score: Tensor, sparsity: float) -> Tensor:
    """In the matrix the floor(entries * sparsity) lowest go; of equal ones the earlier in reading order."""
    values = [value for row in score.tolist() for value in row]
    return torch.tensor(_keep(values, removed_count(len(values), sparsity))).view(score.shape)


def select_nm(score: Tensor, n: int, m: int) -> Tensor:
    """In each m consecutive columns of a row the n highest stay; of equal ones the higher column."""
    mask = []
    for row in score.tolist():
        kept: list[bool] = []
        for start in range(0, len(row), m):
            kept += _keep(row[start : start + m], m - n)
        mask.append(kept)
    return torch.tensor(mask)


def search_rows(score: Tensor, sparsity: float) -> Tensor:
    """The published variant of Wanda (`--use_variant`): one alpha is bisected, each row gets its own threshold.

    The published code indexes position -1 of a row without any score under the threshold; here such a row stays.
    """
    rows = score.tolist()

    def masks(alpha: float) -> list[list[bool]]:
        result = []
        for row in rows:
            ascending = sorted(row)
            running = list(itertools.accumulate(ascending))
            position = -1
            for index, partial in enumerate(running):
                if partial <= alpha * running[-1]:
                    position = index
            if position < 0:
                result.append([True] * len(row))
            else:
                result.append([value > ascending[position] for value in row])
        return result

    def sparsity_of(mask: list[list[bool]]) -> float:
        flat = [kept for row in mask for kept in row]
        return flat.count(False) / len(flat)

    bracket, alpha = [0.0, 0.8], 0.4
    mask = masks(alpha)
    while abs(sparsity_of(mask) - sparsity) > 0.001 and bracket[1] - bracket[0] >= 0.001:
        if sparsity_of(mask) > sparsity:
            new_alpha = (alpha + bracket[0]) / 2
            bracket[1] = alpha
        else:
            new_alpha = (alpha + bracket[1]) / 2
            bracket[0] = alpha
        alpha = new_alpha
        mask = masks(alpha)
    return torch.tensor(mask)


def every_mask(rows: int, columns: int) -> Iterator[Tensor]:
    """All 2 ** (rows * columns) masks of a tiny matrix."""
    for bits in itertools.product((False, True), repeat=rows * columns):
        yield torch.tensor(bits).view(rows, columns)


def obeys_rows(mask: Tensor, sparsity: float) -> bool:
    """Whether every row has at least floor(columns * sparsity) zeros."""
    return all(row.count(False) >= removed_count(len(row), sparsity) for row in mask.tolist())


def obeys_matrix(mask: Tensor, sparsity: float) -> bool:
    """Whether the matrix has at least floor(entries * sparsity) zeros."""
    flat = mask.flatten().tolist()
    return flat.count(False) >= removed_count(len(flat), sparsity)


def obeys_nm(mask: Tensor, n: int, m: int) -> bool:
    """Whether each m consecutive columns of a row have at most n non-zeros."""
    return all(sum(row[start : start + m]) <= n for row in mask.tolist() for start in range(0, len(row), m))


def best_retained(score: Tensor, obeys: Callable[[Tensor], bool]) -> float:
    """The largest sum of kept scores over all masks that obey, by trying every one."""
    return max(retained(score, mask) for mask in every_mask(*score.shape) if obeys(mask))


def retained(score: Tensor, mask: Tensor) -> float:
    """The sum of the kept scores."""
    flat = zip(score.flatten().tolist(), mask.flatten().tolist(), strict=True)
    return math.fsum(value for value, kept in flat if kept)


# Gradients: from the gradients of each sample, each of shape (out, in), written from the formulas


def gradient_norm(gradients: list[Tensor], norm: str) -> list[list[float]]:
    """||G_ij|| over samples: sum_n |g_nij| for l1, sqrt(sum_n g_nij ** 2) for l2 (GBLM-Pruner, section 3)."""
    samples = [gradient.double().tolist() for gradient in gradients]
    result = []
    for i in range(len(samples[0])):
        row = []
        for j in range(len(samples[0][0])):
            values = [sample[i][j] for sample in samples]
            if norm == "l1":
                row.append(math.fsum(abs(value) for value in values))
            else:
                row.append(math.sqrt(math.fsum(value**2 for value in values)))
        result.append(row)
    return result


def gblm_score(weight: Tensor, inputs: list[Tensor], gradients: list[Tensor], norm: str, alpha: float) -> Tensor:
    """S_ij = |W_ij| sqrt(s_j) + alpha |W_ij| ||G_ij||, s_j the published running mean over samples."""
    s, g = published_running_mean(inputs), gradient_norm(gradients, norm)
    rows = weight.double().tolist()
    return torch.tensor(
        [
            [abs(w) * math.sqrt(s[j]) + alpha * abs(w) * g[i][j] for j, w in enumerate(row)]
            for i, row in enumerate(rows)
        ],
        dtype=torch.float64,
    )


def gblm_paper_score(weight: Tensor, inputs: list[Tensor], gradients: list[Tensor], norm: str, alpha: float) -> Tensor:
    """S_ij = |W_ij| ||X_j||_2 + alpha |W_ij| ||G_ij||, with the norm over all tokens of all samples."""
    by_input, g = wanda_score(weight, torch.cat(inputs)).tolist(), gradient_norm(gradients, norm)
    rows = weight.double().tolist()
    return torch.tensor(
        [[by_input[i][j] + alpha * abs(w) * g[i][j] for j, w in enumerate(row)] for i, row in enumerate(rows)],
        dtype=torch.float64,
    )


def gblm_inverse_score(
    weight: Tensor, inputs: list[Tensor], gradients: list[Tensor], norm: str, alpha: float
) -> Tensor:
    """S_ij = |W_ij| sqrt(s_j) / (alpha ||G_ij|| + 1e-8)."""
    s, g = published_running_mean(inputs), gradient_norm(gradients, norm)
    rows = weight.double().tolist()
    return torch.tensor(
        [
            [abs(w) * math.sqrt(s[j]) / (alpha * g[i][j] + 1e-8) for j, w in enumerate(row)]
            for i, row in enumerate(rows)
        ],
        dtype=torch.float64,
    )


def gradient_score(weight: Tensor, gradients: list[Tensor], norm: str) -> Tensor:
    """S_ij = |W_ij| ||G_ij||."""
    g, rows = gradient_norm(gradients, norm), weight.double().tolist()
    return torch.tensor(
        [[abs(w) * g[i][j] for j, w in enumerate(row)] for i, row in enumerate(rows)], dtype=torch.float64
    )


def wanda_plus_score(weight: Tensor, inputs: list[Tensor], gradients: list[Tensor], alpha: float) -> Tensor:
    """S_ij = |W_ij| (||X_j||_2 + alpha sqrt(mean_n g_nij ** 2)) (Wanda++, section 4.1), the norm over all tokens."""
    norms = [math.sqrt(math.fsum(float(x) ** 2 for x in column)) for column in zip(*_tokens(inputs), strict=True)]
    g, root = gradient_norm(gradients, "l2"), math.sqrt(len(gradients))
    rows = weight.double().tolist()
    return torch.tensor(
        [[abs(w) * (norms[j] + alpha * g[i][j] / root) for j, w in enumerate(row)] for i, row in enumerate(rows)],
        dtype=torch.float64,
    )


def _tokens(inputs: list[Tensor]) -> list[list[float]]:
    return [token for sample in inputs for token in sample.double().tolist()]


def pruner_zero_score(weight: Tensor, gradients: list[Tensor], norm: str) -> Tensor:
    """S_ij = W_ij ** 2 * mms(||G||)_ij, mms(x) = (x - min x) / (max x - min x) over the whole matrix."""
    g, rows = gradient_norm(gradients, norm), weight.double().tolist()
    flat = [value for row in g for value in row]
    low, high = min(flat), max(flat)
    return torch.tensor(
        [
            [w * w * ((g[i][j] - low) / (high - low) if high > low else 0.0) for j, w in enumerate(row)]
            for i, row in enumerate(rows)
        ],
        dtype=torch.float64,
    )
