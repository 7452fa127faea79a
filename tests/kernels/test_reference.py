"""The torch twins, against a loop over rows in float64."""

from __future__ import annotations

import pytest
import torch
from fusion_cases import Case, make_case

from mmqwen_kernels import project_rows


def by_hand(case: Case) -> torch.Tensor:
    """The op's definition, one token at a time."""
    rows = [(m, x.double()) for m, item in case.items for x in item]  # type: ignore[misc]
    at = dict(zip(case.slots, rows, strict=True))
    out = torch.zeros(len(case.input_ids), case.columns, dtype=torch.float64)
    for t, token in enumerate(case.input_ids.tolist()):
        if t in at:
            m, x = at[t]
            w1, b1, w2, b2 = (w if w is None else w.double() for w in case.projectors[m])
            hidden = (w1 @ x + b1).clamp(min=0)
            out[t] = w2 @ hidden + (0 if b2 is None else b2)
        elif 0 <= token - case.vocab_start < case.table.shape[0]:
            out[t] = case.table[token - case.vocab_start].double()
    return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("widths", "counts", "vocab_start"),
    [([8], [0], 0), ([8], [1], 0), ([8, 33], [5, 7], 0), ([8, 33, 24], [3, 0, 9], 20)],
)
def test_twin_equals_the_loop(
    widths: list[int], counts: list[int], vocab_start: int, bias: bool
) -> None:
    case = make_case(widths, counts, torch.float64, bias=bias, text=20)
    case.vocab_start = vocab_start
    torch.testing.assert_close(case.exact(), by_hand(case), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(case.run("torch"), by_hand(case), rtol=1e-12, atol=1e-12)


def test_ids_at_slots_of_rows_do_not_matter() -> None:
    case = make_case([8], [3], torch.float32)
    want = case.run("torch")
    case.input_ids[case.slots] = 10**6
    assert torch.equal(case.run("torch"), want)


def test_project_rows() -> None:
    case = make_case([8], [4], torch.float64, text=0)
    rows = torch.cat([x for _, x in case.items])  # type: ignore[misc]
    torch.testing.assert_close(
        project_rows(rows, case.projectors[0]), by_hand(case)[case.slots], rtol=1e-12, atol=1e-12
    )


def test_nan_rows_stay_in_their_slots() -> None:
    case = make_case([8], [3], torch.float32, item_rows=1)
    case.items[1][1].fill_(float("nan"))  # type: ignore[index]
    out = case.run("torch")
    assert out.isnan().any(dim=1).nonzero().flatten().tolist() == [case.slots[1]]


def test_gradients_reach_weights_and_rows() -> None:
    case = make_case([8], [3], torch.float64, item_rows=3)
    w1 = case.projectors[0].w1.requires_grad_()
    rows = case.items[0][1].requires_grad_()  # type: ignore[index]
    case.run("torch").sum().backward()
    assert w1.grad is not None
    assert rows.grad is not None
    assert rows.grad.abs().sum() > 0
