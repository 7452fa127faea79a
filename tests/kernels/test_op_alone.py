"""docs/op-alone.md: its model runs as printed, and the op says what the page says it does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fusion_cases import make_case
from torch import nn

from mmqwen_kernels import Projector, fuse_embeddings, plan_rows, project_rows, warm_up

PAGE = (Path(__file__).parents[2] / "docs" / "op-alone.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE, flags=re.DOTALL))


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's block leaves behind."""
    names: dict[str, Any] = {}
    exec(compile(BLOCKS["model"], "op-alone.md", "exec"), names)
    return names


def test_the_pages_model_puts_each_row_into_its_slot(page: dict[str, Any]) -> None:
    model, ids = page["model"].double(), page["ids"]
    rows = [torch.randn(4, 768).double(), torch.randn(1, 512).double()]
    with torch.no_grad():
        wanted = model.tokens(ids)
        for m, token in enumerate(page["PLACEHOLDERS"]):
            wanted[ids == token] = model.down[m](model.up[m](rows[m]).relu())
        torch.testing.assert_close(model.embed(ids, rows), wanted)


def plan_of(sources: Any, slots: Any) -> Any:
    return plan_rows(sources, slots, 4, [3], dtype=torch.float32, device="cpu")


def test_ids_and_slots_of_two_dimensions_are_refused() -> None:
    case = make_case([8], [5], torch.float32)
    case.input_ids = case.input_ids[None]
    with pytest.raises(ValueError, match=r"input_ids have shape \(1, \d+\), expected \[T\]: flat"):
        case.run("auto")
    with pytest.raises(ValueError, match=r"slots have shape \(2, 2\), .* flatten\(\) them"):
        plan_of([(0, torch.zeros(1, 3))], torch.zeros(2, 2, dtype=torch.bool))


@pytest.mark.parametrize("gradients", [True, False])
def test_modules_for_projectors_are_refused_with_the_remedy(gradients: bool) -> None:
    case = make_case([8], [5], torch.float32)
    module: Any = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, case.columns))
    message = r"projector 0 is a Sequential, .* Projector\(up.weight, up.bias, down.weight"
    with torch.set_grad_enabled(gradients):
        case.projectors = [module]
        with pytest.raises(ValueError, match=message):
            case.run("auto")
        with pytest.raises(ValueError, match=message):
            project_rows(torch.zeros(2, 8), module)
        with pytest.raises(ValueError, match=message):
            warm_up([module])


def test_a_projector_without_its_list_is_refused() -> None:
    case = make_case([8], [5], torch.float32)
    case.projectors = case.projectors[0]  # type: ignore[assignment]
    with pytest.raises(ValueError, match="projector 0 is a Tensor, expected a list of Projector"):
        case.run("auto")


def test_misfitting_weights_are_named() -> None:
    case = make_case([8], [5], torch.float32)
    good = case.projectors[0]
    for bad in (
        good._replace(b1=good.b1[1:]),
        good._replace(w2=good.w2[:, 1:]),
        good._replace(b2=torch.zeros(len(good.w2) + 1)),
    ):
        case.projectors = [bad]
        with pytest.raises(ValueError, match=r"projector 0: w1 .* do not fit together: expected"):
            case.run("torch")
        with pytest.raises(ValueError, match="do not fit together"):
            project_rows(torch.zeros(2, 8), bad, backend="torch")
    case.projectors = [Projector(good.w1, good.b1, good.w2[1:], None)]
    with pytest.raises(ValueError, match=r"gives \d+ columns, expected the token table's, \d+"):
        case.run("torch")
    plan = plan_of([(0, torch.zeros(1, 3))], [0])
    with pytest.raises(ValueError, match="a projector takes rows 8 wide, got 3"):
        fuse_embeddings(case.input_ids[:4], case.table, plan, [good])
    with pytest.raises(ValueError, match="2 projectors for 1 modalities"):
        fuse_embeddings(case.input_ids[:4], case.table, plan, [good, good])


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("bare", [True, False])
def test_rows_without_their_modality_are_refused(count: int, bare: bool) -> None:
    rows = torch.zeros(count, 3)
    with pytest.raises(ValueError, match=r"no list of \(modality index, tensor \[n, d\]\)"):
        plan_of([rows] if bare else [(rows, 0)], list(range(count)))


def test_more_rows_than_slots() -> None:
    with pytest.raises(ValueError, match="2 rows for 1 slots; sources follow their slots"):
        plan_of([(0, torch.zeros(2, 3))], [0])
