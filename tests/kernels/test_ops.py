"""The public op: its API, its errors, its shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from fusion_cases import beside_projected, in_whole_numbers, make_case, relative_error, shard
from rounding import UNIT, random_walk

from mmqwen_kernels import (
    BackendChoice,
    fuse_embeddings,
    plan_rows,
    project_rows,
    select_backend,
)
from mmqwen_kernels.select import BACKENDS

KERNELS = Path(__file__).parents[2] / "kernels"


# -- choice of backend ---------------------------------------------------------------------------


def test_auto_is_torch_on_the_cpu_and_says_why() -> None:
    choice = select_backend("cpu", torch.float32)
    assert choice == ("torch", "no kernels for cpu devices")


def test_auto_on_cuda_is_the_kernels_only_where_they_were_validated(monkeypatch) -> None:
    from mmqwen_kernels import select

    monkeypatch.setattr("mmqwen_kernels.launcher.interpreting", lambda: False)

    def pick(capability: tuple[int, int], dtype: torch.dtype) -> BackendChoice:
        select._auto_on_cuda.cache_clear()
        select._why_not_triton.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return select_backend("cuda", dtype)

    try:
        assert pick((9, 0), torch.bfloat16).name == "triton"
        assert pick((9, 0), torch.float16).name == "triton"
        assert "rows are torch.float32" in pick((9, 0), torch.float32).reason
        assert "not been validated" in pick((8, 0), torch.bfloat16).reason
        assert "expected (8, 0) or later" in pick((7, 5), torch.bfloat16).reason
    finally:
        select._auto_on_cuda.cache_clear()
        select._why_not_triton.cache_clear()


def test_torch_is_always_there() -> None:
    assert select_backend("meta", torch.float64, "torch") == ("torch", "asked for")


@pytest.mark.parametrize(
    ("device", "dtype", "backend", "message"),
    [
        ("cpu", torch.float32, "cutlass", "expected one of"),
        pytest.param(
            *("cpu", torch.float32, "triton", "TRITON_INTERPRET=1"),
            marks=pytest.mark.skipif(
                os.environ.get("TRITON_INTERPRET") == "1",
                reason="TRITON_INTERPRET=1 is set, which is what the refusal asks for: unset it",
            ),
        ),
        ("cpu", torch.float64, "triton", "rows are torch.float64"),
        ("meta", torch.float32, "triton", "no kernels for meta"),
    ],
)
def test_what_cannot_run_is_refused(
    device: str, dtype: torch.dtype, backend: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        select_backend(device, dtype, backend)


def test_backends_are_listed() -> None:
    assert set(BACKENDS) == {"auto", "torch", "triton"}


def test_importing_the_package_imports_no_triton() -> None:
    code = (
        "import sys, torch, mmqwen_kernels as k;"
        "k.select_backend('cpu', torch.float32);"
        "assert 'mmqwen_kernels.triton_kernels' not in sys.modules"
    )
    env = os.environ | {"PYTHONPATH": str(KERNELS)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=120)


# -- the op --------------------------------------------------------------------------------------


def test_a_plan_and_its_sources_give_the_same() -> None:
    case = in_whole_numbers(make_case([8, 33], [5, 7], torch.float32))
    plan = plan_rows(
        case.items,
        case.slots,
        len(case.input_ids),
        [8, 33],
        dtype=torch.float32,
        device="cpu",
    )
    assert torch.equal(
        fuse_embeddings(case.input_ids, case.table, plan, case.projectors), case.run("auto")
    )


def test_out_is_written_and_returned() -> None:
    case = in_whole_numbers(make_case([8], [5], torch.float32))
    out = torch.full((len(case.input_ids), case.columns), float("nan"))
    assert case.run("torch", out=out) is out
    assert torch.equal(out, case.run("torch"))


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    case = make_case([8, 24], [5, 3], dtype, ids_dtype=ids_dtype)
    out = case.run("torch")
    assert out.dtype == dtype
    # Hidden activations and result are rounded; torch may round a sum before it adds the bias.
    assert relative_error(out, case.exact()) < 4 * UNIT[dtype] + random_walk(case.projectors[1])


@pytest.mark.parametrize("counts", [[0, 0], [5, 9]])
@pytest.mark.parametrize("stays", [(False,), (True, False)])
def test_rows_projected_before_stand_beside_others(
    counts: list[int], stays: tuple[bool, ...]
) -> None:
    case = make_case([24, 80], counts, torch.float32, text=30)  # as wide as an embedding: 80
    for count in (1, 30):
        beside = beside_projected(case, count, stays)
        got = fuse_embeddings(
            case.input_ids, case.table, beside.sources, case.projectors,
            slots=beside.slots, backend="torch",
        )  # fmt: skip
        beside.check(case, got)


def test_rows_projected_before_that_do_not_fit_are_refused() -> None:
    case = make_case([24], [3], torch.float32, text=9)
    beside = beside_projected(case, 4)
    sources, slots = beside.sources, beside.slots
    for tables in ([t[:, :-1] for t in sources.tables], [t.half() for t in sources.tables]):
        with pytest.raises(ValueError, match=r"projected before are .*, expected \[n, 80\] of"):
            fuse_embeddings(
                case.input_ids, case.table, sources._replace(tables=tuple(tables)), case.projectors,
                slots=slots, backend="torch",
            )  # fmt: skip
    with pytest.raises(ValueError, match="7 rows for 6 slots"):
        fuse_embeddings(
            case.input_ids, case.table, sources, case.projectors, slots=slots[:-1], backend="torch"
        )


def test_slots_are_needed_with_sources() -> None:
    case = make_case([8], [5], torch.float32)
    with pytest.raises(ValueError, match="slots are needed"):
        fuse_embeddings(case.input_ids, case.table, case.items, case.projectors)


def test_rows_and_slots_must_match() -> None:
    case = make_case([8], [5], torch.float32)
    case.slots.pop()
    with pytest.raises(ValueError, match="5 rows for 4 slots"):
        case.run("auto")


def test_a_wrong_width_is_named() -> None:
    case = make_case([8], [5], torch.float32)
    case.items[0] = (0, torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"rows are \(3, 9\), expected \[n, 8\]"):
        case.run("auto")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ids_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    case = make_case([8], [1], torch.float32)
    case.input_ids = case.input_ids.to(dtype)
    with pytest.raises(ValueError, match=f"input_ids are {dtype}, expected int32 or int64"):
        case.run("torch")


def test_text_alone_is_an_embedding() -> None:
    case = make_case([8], [0], torch.float32, text=9)
    assert torch.equal(case.run("auto"), case.table[case.input_ids])


def test_halves_make_the_whole() -> None:
    case = in_whole_numbers(make_case([8], [4], torch.float32, text=3, item_rows=4))
    out = case.table[case.input_ids].clone()
    rows = project_rows(case.items[0][1], case.projectors[0])  # type: ignore[index]
    out[case.slots] = rows
    assert torch.equal(out, case.run("torch"))


def test_under_torch_compile_the_torch_backend_gives_the_same() -> None:
    case = in_whole_numbers(make_case([8, 24], [5, 3], torch.float32))

    def step(ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        fused = fuse_embeddings(ids, table, case.items, case.projectors, slots=case.slots)
        return fused * 2

    compiled = torch.compile(step, backend="eager")
    assert torch.equal(compiled(case.input_ids, case.table), step(case.input_ids, case.table))


# -- shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_sum_to_the_whole(ranks: int) -> None:
    case = make_case([8, 33], [5, 7], torch.float64, text=40)
    total = sum(shard(case, rank, ranks).run("torch") for rank in range(ranks))
    case.check(total)


def _rank_main(rank: int, ranks: int, file: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=ranks
    )
    case = make_case([8, 33], [5, 7], torch.float64, text=40)
    out = shard(case, rank, ranks).run("auto")
    torch.distributed.all_reduce(out)  # the one collective that the vocabulary shard needs anyway
    case.check(out)
    torch.distributed.destroy_process_group()


def test_two_processes_and_one_all_reduce(tmp_path: Path) -> None:
    """Tensor parallelism over gloo: one all-reduce sums text rows and projected rows."""
    mp.spawn(_rank_main, args=(2, str(tmp_path / "store")), nprocs=2)
