"""Exchanges of one kept for one removed weight of the same row, with their exact effect on the error."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.core.gram import full_precision

CHUNK_BYTES = 2**28  # of the pairs that are compared at once
LEAST = 1e-5  # of the two weights' own energies: what rounding may feign is no improvement


@full_precision()
def exchange(
    weight: Float[Tensor, "out in"],
    gram: Float[Tensor, "in in"],
    right: Float[Tensor, "out in"],
    mask: Bool[Tensor, "out in"],
    *,
    group: int | None,
    limit: int,
    candidates: int,
) -> tuple[Bool[Tensor, "out in"], int]:
    """A mask with as many kept weights in every row and a smaller error, and the number of exchanges in all.

    With ``w`` a row, ``m`` its mask and ``c = right - (w m) G`` the correlation of the inputs with what is missing,
    removing a kept u costs ``2 w_u c_u + w_u² G_uu``, returning a removed p costs ``-2 w_p c_p + w_p² G_pp``, and both
    together ``-2 w_u w_p G_up`` more. The cheapest pair goes while its cost is negative, at most `limit` times.
    With `group` pairs are within each `group` consecutive inputs; else among the `candidates` cheapest of either kind.
    """
    rows, width = weight.shape
    count = min(candidates, width) if candidates else width
    pairs = width * group if group else count * count
    chunk = max(1, CHUNK_BYTES // (3 * weight.element_size() * max(pairs, width)))
    diagonal = gram.diagonal()
    result, total = mask.clone(), 0
    for start in range(0, rows, chunk):
        active = torch.arange(start, min(start + chunk, rows), device=weight.device)
        own, kept = weight[active], mask[active]
        missing = right[active] - (own * kept) @ gram
        energy = own.square() * diagonal
        for _ in range(limit):
            slope = 2 * own * missing
            removal = torch.where(kept, energy + slope, torch.inf)
            back = torch.where(kept, torch.inf, energy - slope)
            if group:
                cost, gone, new = _best_in_groups(own, gram, removal, back, group)
            else:
                cost, gone, new = _best_pair(own, gram, removal, back, count)
            index = torch.arange(len(active), device=weight.device)
            better = cost < -LEAST * (energy[index, gone] + energy[index, new])
            if not bool(better.any()):
                break
            active, own, kept, missing, energy = (tensor[better] for tensor in (active, own, kept, missing, energy))
            gone, new, index = gone[better], new[better], index[: len(active)]
            missing.addcmul_(gram[gone], own[index, gone].unsqueeze(1))
            missing.addcmul_(gram[new], own[index, new].unsqueeze(1), value=-1)
            kept[index, gone], kept[index, new] = False, True
            result[active, gone], result[active, new] = False, True
            total += len(active)
    return result, total


def _best_pair(
    weight: Float[Tensor, "rows in"],
    gram: Float[Tensor, "in in"],
    removal: Float[Tensor, "rows in"],
    back: Float[Tensor, "rows in"],
    count: int,
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Each row's lowest cost, the weight to remove and the one to return, among the `count` cheapest of either."""
    cost_out, out = removal.topk(count, dim=1, largest=False)
    cost_in, into = back.topk(count, dim=1, largest=False)
    both = gram[out.unsqueeze(2), into.unsqueeze(1)]
    both.mul_(weight.gather(1, out).mul_(-2).unsqueeze(2)).mul_(weight.gather(1, into).unsqueeze(1))
    both.add_(cost_out.unsqueeze(2)).add_(cost_in.unsqueeze(1))
    cost, best = both.flatten(1).min(dim=1)
    gone = out.gather(1, (best // count).unsqueeze(1)).squeeze(1)
    return cost, gone, into.gather(1, (best % count).unsqueeze(1)).squeeze(1)


def _best_in_groups(
    weight: Float[Tensor, "rows in"],
    gram: Float[Tensor, "in in"],
    removal: Float[Tensor, "rows in"],
    back: Float[Tensor, "rows in"],
    group: int,
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Each row's lowest cost, the weight to remove and the one to return, over all pairs of the same group."""
    rows, width = weight.shape
    groups = width // group
    blocks = gram.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    grouped = weight.view(rows, groups, group)
    both = blocks * (-2 * grouped).unsqueeze(3) * grouped.unsqueeze(2)
    both.add_(removal.view(rows, groups, group, 1)).add_(back.view(rows, groups, 1, group))
    cost, best = both.flatten(1).min(dim=1)
    first = best // (group * group) * group
    return cost, first + best % (group * group) // group, first + best % group
