"""Slow versions of the solvers in float64, written from the published descriptions, for a Gram matrix G of inputs.

Nothing here imports Secateur, so that a shared mistake cannot hide. Masks are bool tensors, True = kept. Counts are
exact where the published code removes one weight too many: after each column block, the floor of the share so far.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from reference import removed_count, select_matrix, select_nm, select_rows

Select = Callable[[Tensor, int], Tensor]  # (scores of a column block, its first column) -> mask


def inverse_cholesky(gram: Tensor, damping: float) -> Tensor:
    """The upper U with UᵀU = H⁻¹, by the three steps of the published code: factor, invert, factor again."""
    hessian = gram.double().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = float(diagonal[diagonal > 0].mean()) if bool((diagonal > 0).any()) else 1.0
    hessian += damping * diagonal.mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def pooled(rows: int, sparsity: float) -> Select:
    """The lowest scores of a column block, all rows together."""

    def select(score: Tensor, first: int) -> Tensor:
        last = first + score.shape[1]
        count = removed_count(rows * last, sparsity) - removed_count(rows * first, sparsity)
        mask = torch.ones(score.numel(), dtype=torch.bool)
        mask[score.flatten().sort(stable=True).indices[:count]] = False
        return mask.view(score.shape)

    return select


def row_by_row(sparsity: float) -> Select:
    """The lowest scores of a column block, each row by itself."""

    def select(score: Tensor, first: int) -> Tensor:
        return torch.cat([pooled(1, sparsity)(row.unsqueeze(0), first) for row in score])

    return select


def groups_of(n: int, m: int) -> Select:
    """The n highest of the m scores."""
    return lambda score, first: select_nm(score, n, m)


def obs_loop(
    weight: Tensor,
    gram: Tensor,
    score: Callable[[Tensor, int, Tensor], Tensor],
    select: Select,
    *,
    every: int = 128,
    damping: float = 0.01,
) -> tuple[Tensor, Tensor]:
    """SparseGPT's loop without lazy updates: each column in turn, and all later columns at once.

    `score` gets the current weights of `every` columns, the first of them, and diag(U); `select` makes the mask of it.
    """
    w, u = weight.double().clone(), inverse_cholesky(gram, damping)
    mask = torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        if j % every == 0:
            mask[:, j : j + every] = select(score(w[:, j : j + every], j, u.diagonal()), j)
        q = torch.where(mask[:, j], w[:, j], 0.0)
        error = (w[:, j] - q) / u[j, j]
        w[:, j:] -= error.outer(u[j, j:])
        w[:, j] = q
    return w, mask


def sparsegpt(
    weight: Tensor, gram: Tensor, select: Select, *, every: int = 128, damping: float = 0.01
) -> tuple[Tensor, Tensor]:
    """SparseGPT: dead inputs to zero, scores w² / U_jj²."""
    live = weight.double() * (gram.diagonal() > 0)
    return obs_loop(
        live,
        gram,
        lambda w, first, pivots: w**2 / pivots[first : first + w.shape[1]] ** 2,
        select,
        every=every,
        damping=damping,
    )


def normalised(weight: Tensor, gram: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """The weight times the input norms, the Gram matrix of unit-norm inputs with damping, and the norms."""
    norm = gram.double().diagonal().sqrt()
    matrix = gram.double() / norm.outer(norm) + damping * torch.eye(len(gram), dtype=torch.float64)
    return weight.double() * norm, matrix, norm


def project(score: Tensor, kind: str | tuple[int, int], sparsity: float) -> Tensor:
    """The mask per "row" or "matrix" or of (n, m)."""
    if isinstance(kind, tuple):
        return select_nm(score, *kind)
    return (select_rows if kind == "row" else select_matrix)(score, sparsity)


def partly(score: Tensor, kind: str | tuple[int, int], sparsity: float, share: float) -> Tensor:
    """The mask on the way to a pattern: of N:M, the zeros that it would have in the end, the lowest ones first."""
    if not isinstance(kind, tuple):
        return project(score, kind, round(sparsity * share, 15))
    last = project(score, kind, sparsity)
    going = score.masked_fill(last, torch.inf).flatten().sort(stable=True).indices
    mask = torch.ones(score.numel(), dtype=torch.bool)
    mask[going[: removed_count(score.numel(), round(sparsity * share, 15))]] = False
    return mask.view(score.shape)


def admm(
    weight: Tensor,
    gram: Tensor,
    kind: str | tuple[int, int],
    sparsity: float,
    *,
    steps: int = 20,
    growing: int = 15,
    trace: list[tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Boža's gradual ADMM: (weights, mask). `trace` gets Z and U of every step, in units of normalised inputs."""
    dense, a, norm = normalised(weight, gram, 0.1)
    inverse = torch.linalg.inv(a + torch.eye(len(a), dtype=torch.float64))
    w, u = dense.clone(), torch.zeros_like(dense)
    for t in range(1, steps + 1):
        if t <= growing:
            mask = partly((w + u).abs(), kind, sparsity, 1 - (1 - t / growing) ** 3)
        z = (w + u) * mask
        u = u + w - z
        if trace is not None:
            trace.append((z, u))
        w = (dense @ a + (z - u)) @ inverse
    return z / norm, mask


def alps(weight: Tensor, gram: Tensor, kind: str | tuple[int, int], sparsity: float, *, polish: int = 10):
    """ALPS with one eigendecomposition: (weights, mask, iterations, final rho)."""
    dense, h, norm = normalised(weight, gram, 0.01)
    values, vectors = torch.linalg.eigh(h)
    rho, v = 0.1, torch.zeros_like(dense)
    mask = project(dense.abs(), kind, sparsity)
    d = dense * mask
    for t in range(1, 301):
        w = (dense @ h - v + rho * d) @ vectors / (values + rho) @ vectors.T
        new = project((w + v / rho).abs(), kind, sparsity)
        d = (w + v / rho) * new
        v = v + rho * (w - d)
        if t % 3 == 0:
            share = int((new != mask).sum()) / int(new.sum())
            mask = new
            if share == 0 or (t >= 30 and share < 0.0003):
                break
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
    mask = project(w.abs(), kind, sparsity)
    return conjugate_gradients(h, dense @ h, w * mask, mask, polish) / norm, mask, t, rho


def conjugate_gradients(matrix: Tensor, right: Tensor, start: Tensor, mask: Tensor, steps: int) -> Tensor:
    """Textbook conjugate gradients, row by row, on the kept coordinates."""
    result = torch.zeros_like(start)
    for row in range(len(start)):
        kept = mask[row].nonzero().squeeze(1)
        a, b, x = matrix[kept][:, kept], right[row, kept], start[row, kept]
        r = b - a @ x
        p = r.clone()
        for _ in range(steps):
            if float(r @ r) < 1e-30:
                break
            alpha = (r @ r) / (p @ a @ p)
            x = x + alpha * p
            new = r - alpha * (a @ p)
            p = new + (new @ new) / (r @ r) * p
            r = new
        result[row, kept] = x
    return result


def least_squares(
    weight: Tensor, x: Tensor, mask: Tensor, damping: float = 0.0, target: Tensor | None = None
) -> Tensor:
    """The best weights on each row's support for the outputs on x (or `target`), by a QR solver on the tokens.

    Damping is appended as further tokens, one for each input with its norm times sqrt(damping).
    """
    x, weight = x.double(), weight.double()
    extra = torch.diag(x.norm(dim=0)) * damping**0.5
    tokens = torch.cat([x, extra])
    outputs = torch.cat([x @ weight.T if target is None else target.double(), extra @ weight.T])
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        kept = mask[row].nonzero().squeeze(1)
        if len(kept):
            result[row, kept] = torch.linalg.lstsq(tokens[:, kept], outputs[:, row], driver="gelsd").solution
    return result


def error(weight: Tensor, other: Tensor, x: Tensor) -> float:
    """||(W - W') X||² / ||W X||² from the tokens."""
    x, weight = x.double(), weight.double()
    return float(((weight - other.double()) @ x.T).square().sum() / (weight @ x.T).square().sum())


def row_masks(width: int, kept: int) -> Tensor:
    """All masks of one row with so many kept."""
    masks = [[j in support for j in range(width)] for support in itertools.combinations(range(width), kept)]
    return torch.tensor(masks)


def best_row_error(weight: Tensor, x: Tensor, kept: int, *, refit: bool) -> float:
    """The smallest ||(w - w') X||² of one row over all masks with so many kept, with the dense or the best weights."""
    x, weight = x.double(), weight.double().view(1, -1)
    best = float("inf")
    for mask in row_masks(weight.shape[1], kept):
        new = least_squares(weight, x, mask.view(1, -1)) if refit else weight * mask
        best = min(best, float(((weight - new) @ x.T).square().sum()))
    return best


def best_swap(weight: Tensor, x: Tensor, mask: Tensor, group: int) -> tuple[Tensor, float]:
    """The mask of one row that is best for ||(w - w m) X||² and one swap within a group away, and that error."""
    best, lowest = mask, float(((weight * ~mask).double() @ x.double().T).square().sum())
    for u, p in itertools.product(range(len(mask)), repeat=2):
        if not (mask[u] and not mask[p] and u // group == p // group):
            continue
        new = mask.clone()
        new[u], new[p] = False, True
        value = float(((weight * ~new).double() @ x.double().T).square().sum())
        if value < lowest:
            best, lowest = new, value
    return best, lowest
