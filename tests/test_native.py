"""The native helper gives what Python gives, bit for bit, whatever it is handed.

With MMQWEN_TEST_NATIVE it is the helper at that path: `run_sanitized.py`.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from bank_tables import Tables, pack_named

from messages_fuzz import DTYPES, SPECS, TURN_ID, make_case
from mmqwen.banks import BankCatalog, BankRows, build_bank, parse_banks
from mmqwen.pack_slices import find_rows
from mmqwen.packs import directory, pack_rows
from mmqwen_kernels import HostRows, RowPlan, native, plan_rows
from native_builds import build, helper_for_tests, load

FAST, WHOLE = 400, 20_000


@pytest.fixture(scope="module")
def helper(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    return helper_for_tests(tmp_path_factory.mktemp("native"))


@pytest.fixture(autouse=True)
def _kept() -> Iterator[None]:
    before = native.helper
    yield
    native.helper = before


# -- messages ------------------------------------------------------------------------------------


def processor_of(
    dtype: torch.dtype, max_model_len: int = 900, banks: BankCatalog | None = None
) -> Any:
    """A processor of an engine that was never started."""
    pytest.importorskip("vllm")
    from mmqwen.vllm_plugin.processing import PackingProcessor

    model_config = SimpleNamespace(
        dtype=dtype, max_model_len=max_model_len, get_vocab_size=lambda: 1100
    )
    mm_config = SimpleNamespace(limit_per_prompt=None, mm_processor_cache_gb=0)
    tokenizer = SimpleNamespace(get_vocab=lambda: {"<|im_end|>": TURN_ID})
    made = object.__new__(PackingProcessor)
    made.info = SimpleNamespace(  # type: ignore[assignment]
        specs=SPECS,
        banks=banks or BankCatalog({}, SPECS),
        ctx=SimpleNamespace(model_config=model_config, get_mm_config=lambda: mm_config),
        get_tokenizer=lambda: tokenizer,
    )
    made.__dict__["_hash_algorithm"] = "blake3"
    return made


def answer(processor: Any, tokens: list[Any], data: dict[str, Any]) -> Any:
    """Everything that there is to say of an answer, or of a refusal."""
    from mmqwen.vllm_plugin.processing import PACK_MODALITY as KEY

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, accepted = processor.process(list(tokens), dict(data))
    except Exception as error:
        return type(error), str(error)
    packs = [item["pack"].data[0] for item in made["mm_kwargs"].get(KEY, ())]
    assert all(pack.dtype == torch.int64 for pack in packs)
    return (
        [(type(token), token) for token in made["prompt_token_ids"]],
        [pack.numpy().tobytes() for pack in packs],
        made["mm_hashes"],
        [
            (r.offset, r.length, None if r.is_embed is None else r.is_embed.tolist())
            for r in made["mm_placeholders"][KEY]
        ],
        accepted,
    )


def compare_messages(helper: ModuleType, seeds: range) -> int:
    """How many of the cases the helper answered itself."""
    processors = {dtype: processor_of(dtype) for dtype in DTYPES}
    taken = 0
    for seed in seeds:
        dtype, tokens, data = make_case(seed)
        native.helper = None
        want = answer(processors[dtype], tokens, data)
        native.helper = helper
        made = processors[dtype]._process_natively(list(tokens), data, processors[dtype].info.banks)
        taken += made is not None
        assert answer(processors[dtype], tokens, data) == want, f"case {seed}"
    return taken


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> BankCatalog:
    """Two banks of modality a, one of c."""
    folder = tmp_path_factory.mktemp("banks")
    files = {}
    for name, modality in (("first", "a"), ("second", "a"), ("third", "c")):
        np.save(folder / "rows.npy", np.zeros((9, SPECS[modality].dim), np.float32))
        files[name] = folder / f"{name}.bank"
        build_bank(folder / "rows.npy", files[name], modality=modality)
    return BankCatalog(parse_banks(files), SPECS)


def with_names(data: dict[str, Any], seed: int) -> dict[str, Any]:
    """The items, some of which name rows instead."""
    rng = random.Random(seed)

    def name() -> Any:
        ids = [rng.randrange(10 if rng.random() < 0.02 else 9) for _ in range(rng.randint(1, 6))]
        own = ("first", "second") if modality == "a" else ("third",)
        bank = rng.choice(own if rng.random() > 0.02 else ("first", "third"))
        return rng.choice((BankRows(bank, ids), {"bank": bank, "ids": ids}))

    changed = {}
    for modality, value in data.items():
        if modality in ("a", "c") and isinstance(value, (list, tuple)):
            value = type(value)(name() if rng.random() < 0.6 else item for item in value)
        changed[modality] = value
    return changed


def test_messages_that_name_rows_equal_the_twins(helper: ModuleType, banks: BankCatalog) -> None:
    processors = {dtype: processor_of(dtype, banks=banks) for dtype in DTYPES}
    taken = 0
    for seed in range(FAST):
        dtype, tokens, data = make_case(seed)
        data = with_names(data, seed)
        native.helper = None
        want = answer(processors[dtype], tokens, data)
        native.helper = helper
        made = processors[dtype]._process_natively(list(tokens), data, processors[dtype].info.banks)
        taken += made is not None
        assert answer(processors[dtype], tokens, data) == want, f"case {seed}"
    assert taken > FAST / 4


def test_messages_equal_the_twins(helper: ModuleType) -> None:
    assert compare_messages(helper, range(FAST)) > FAST / 3


@pytest.mark.fuzz
def test_messages_equal_the_twins_in_20_000_cases(helper: ModuleType) -> None:
    assert compare_messages(helper, range(FAST, FAST + WHOLE)) > WHOLE / 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_float_is_rounded_as_torch_rounds_it(helper: ModuleType, dtype: torch.dtype) -> None:
    """All upper halves of float32, with lower halves around each tie."""
    processor = processor_of(dtype, 100_000)
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper | lower
        rows = torch.from_numpy(bits.numpy().astype(np.uint32).view(np.float32)).view(-1, 8)
        rows = rows[rows.to(dtype).isfinite().all(dim=1)]
        data = {"a": list(rows.split(6))}
        native.helper = None
        want = answer(processor, [], data)
        native.helper = helper
        assert answer(processor, [], data) == want


def test_a_message_over_256_kb_is_packed_while_other_threads_run(helper: ModuleType) -> None:
    """Beyond that size the GIL is let go; the answer is the same."""
    processor = processor_of(torch.float32, 100_000)
    rows = torch.randn(60_000, 8)
    native.helper = None
    want = answer(processor, [], {"a": list(rows.split(6))})
    native.helper = helper
    found: list[Any] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(answer(processor, [], {"a": list(rows.split(6))}))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [want] * 4


def test_arguments_of_another_kind_are_left_to_python(helper: ModuleType) -> None:
    rows = [torch.zeros(1, 8)]
    good = ([1], [(0, 9, 8, 6, rows)], (), 256, 100, 0)
    assert helper.pack_message(*good) is not None
    for at, value in (
        (0, (1,)), (0, None), (1, ()), (1, []), (1, [(0, 9, 8, 6)]), (1, [(0, None, 8, 6, rows)]),
        (1, [(300, 9, 8, 6, rows)]), (1, [(0, 9, 1 << 20, 6, rows)]), (1, [(0, 9, 0, 6, rows)]),
        (1, [(0, 9, 8, 6, None)]), (1, [(0, 9, 8, 6, rows)] * 65), (2, tuple(range(9))),
        (2, ("x",)), (3, "x"), (4, 2**40), (4, 1), (5, 3), (5, -1), (5, None),
    ):  # fmt: skip
        bad = [*good]
        bad[at] = value  # type: ignore[call-overload]
        assert helper.pack_message(*bad) is None, (at, value)
    ids = np.array([1, 2])
    named = ([1], [(0, 9, 8, 6, [None], [(3, ids, bytes(32))])], (), 256, 100, 0)
    assert helper.pack_message(*named) is not None
    for value in (
        7, (), [], [None], [7], [(3, ids)], [(3, ids, bytes(31))], [("x", ids, bytes(32))],
        [(-1, ids, bytes(32))], [(1 << 20, ids, bytes(32))], [(3, [1], bytes(32))],
        [(3, ids.astype(float), bytes(32))], [(3, ids[:0], bytes(32))],
        [(3, -ids, bytes(32))], [(3, ids << 32, bytes(32))], [(3, np.ones(7, int), bytes(32))],
        [(3, np.ones(4, int)[::2], bytes(32))],
    ):  # fmt: skip
        table = [(0, 9, 8, 6, [None], value)]
        assert helper.pack_message([1], table, (), 256, 100, 0) is None, value
    assert helper.pack_message() is None
    assert helper.find_rows() is None
    assert helper.find_rows([None], (8,), 0, None) is None
    rows_of = directory(pack_named([(0, 0, [1, 2])], (8,), torch.float32))
    assert helper.find_rows([rows_of], (8,), 0, np.array([8, 3, 32, 0, 1, 0, 3])) is not None
    for table in (None, 7, np.zeros(7), np.array([0, 3, 32, 0, 1, 0, 3]), np.zeros(0, np.int64)):
        assert helper.find_rows([rows_of], (8,), 0, table) is None, table
    assert helper.find_rows([rows_of], (8,), 0, np.tile([8, 3, 32, 0, 1, 0, 3], 65)) is None
    assert helper.count_rows() is None


# -- steps ---------------------------------------------------------------------------------------

WIDTHS = (8, 1, 5)


def make_step(
    seed: int, with_banks: bool = False
) -> tuple[torch.dtype, list[Any], torch.Tensor, int, Tables | None]:
    """Slices of packs, some of them broken, and a mask that fits, mostly."""
    rng = random.Random(seed)
    dtype = rng.choice(DTYPES)
    banks = None
    if with_banks:
        torch.manual_seed(seed)
        sizes = [rng.choice((6, 6, 6, 5)) for _ in WIDTHS]
        banks = Tables(
            [
                (m, torch.randn(size, width).to(dtype), rng.random() < 0.5)
                for m, (size, width) in enumerate(zip(sizes, WIDTHS, strict=True))
            ][: rng.choice((3, 3, 3, 2))]
        )
    parts: list[Any] = []
    for _ in range(rng.choice((0, 1, 1, 3, 9))):
        of = rng.choice(DTYPES) if rng.random() < 0.02 else dtype
        shape = [(rng.randrange(3), rng.randint(1, 4)) for _ in range(rng.randint(1, 4))]
        if banks is None:
            rows = directory(pack_rows([(m, torch.randn(n, WIDTHS[m]).to(of)) for m, n in shape]))
        else:
            runs = [
                (m, rng.choice((None, m, m)), [rng.randrange(6) for _ in range(n)])
                for m, n in shape
            ]
            rows = directory(pack_named(runs, WIDTHS, of))
        begin = rng.randint(0, len(rows))
        part = rows[begin : rng.randint(begin, len(rows))]
        kind = rng.random()
        if kind < 0.01:
            part = part.clone()
        elif kind < 0.02:
            part = rows[::2]
        elif kind < 0.03:
            part = part.float()
        elif kind < 0.05 and len(part):
            part[0, 0] = rng.choice((0, -1, 1 << 40, -(1 << 62), (1 << 63) - 1, -(1 << 63)))
        elif kind < 0.08 and len(part):
            part[-1, 1] ^= 1 << rng.randrange(63)
        parts.append(part)
    total = sum(map(len, parts)) + (rng.random() < 0.02)
    tokens = total + rng.randint(0, 20)
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[rng.sample(range(tokens), total)] = True
    return dtype, parts, mask, tokens, banks


def plan_of(
    dtype: torch.dtype, parts: list[Any], mask: Any, tokens: int, banks: Tables | None = None
) -> Any:
    try:
        rows = find_rows(parts, WIDTHS, dtype, banks)
        made = plan_rows(rows, mask, tokens, WIDTHS, dtype=dtype, device="cpu")
    except Exception as error:
        return type(error), str(error)
    assert isinstance(made, RowPlan)
    entries = made.buffer[: 64 * 4].view(torch.int64).view(4, 8)
    where = entries[:, 3].tolist()
    return (
        made.counts, made.widths, made.num_tokens, made.addresses_at, made.order_at, made.rows_at,
        made.align_bytes, made.stride, made.order.tolist(), entries[:, [0, 1, 2, 4, 5]].tolist(),
        [at and at - made.buffer.data_ptr() for at in where],
        [None if r is None else (r.dtype, r.view(torch.uint8).tolist()) for r in made.rows],
        rows.modality.tolist(), rows.address.tolist(),
        rows.resident is not None and rows.resident.tolist(),
    )  # fmt: skip


def compare_steps(helper: ModuleType, seeds: range, with_banks: bool = False) -> None:
    for seed in seeds:
        case = make_step(seed, with_banks)
        native.helper = None
        want = plan_of(*case)
        native.helper = helper
        assert plan_of(*case) == want, f"case {seed}"


@pytest.mark.parametrize("with_banks", [False, True])
def test_steps_equal_the_twins(helper: ModuleType, with_banks: bool) -> None:
    compare_steps(helper, range(FAST), with_banks)


@pytest.mark.fuzz
def test_steps_equal_the_twins_in_20_000_cases(helper: ModuleType) -> None:
    compare_steps(helper, range(FAST, FAST + WHOLE))
    compare_steps(helper, range(FAST, FAST + WHOLE // 4), with_banks=True)


def test_many_rows_are_gathered_while_other_threads_run(helper: ModuleType) -> None:
    parts = [directory(pack_rows([(0, torch.randn(3000, 8))])) for _ in range(8)]
    total = sum(map(len, parts))
    case = (torch.float32, parts, torch.ones(total, dtype=torch.bool), total)
    native.helper = None
    want = plan_of(*case)
    native.helper = helper
    assert plan_of(*case) == want


@pytest.mark.parametrize("damage", ["modality", "mask", "more slots", "address type"])
def test_rows_by_address_that_do_not_fit_are_left_to_python(
    helper: ModuleType, damage: str
) -> None:
    rows = torch.randn(3, 8)
    address = np.arange(3, dtype=np.int64) * 32 + rows.data_ptr()
    modality, mask = np.zeros(3, dtype=np.int64), np.ones(3, dtype=np.bool_)
    assert helper.count_rows(address, modality, mask, 3, 1) == (3,)
    if damage == "modality":
        modality[1] = 1
    elif damage == "mask":
        mask[1] = False
    elif damage == "more slots":
        mask = np.ones(4, dtype=np.bool_)
    else:
        address = address.astype(np.float64)
    assert helper.count_rows(address, modality, mask, 3, 1) is None


def test_write_rows_writes_nothing_outside_its_buffer(helper: ModuleType) -> None:
    rows = torch.randn(3, 8)
    address = np.arange(3, dtype=np.int64) * 32 + rows.data_ptr()
    modality, mask = np.zeros(3, dtype=np.int64), np.ones(3, dtype=np.bool_)
    good = (address, modality, mask, np.zeros(120, np.uint8), (3,), (32,), 0, [24])
    assert helper.write_rows(*good) is True
    assert good[3][24:].tobytes() == rows.numpy().tobytes()
    for at, value in (
        (3, np.zeros(119, np.uint8)), (4, (2,)), (4, (4,)), (5, (33,)), (6, 104), (6, 4), (6, -8),
        (7, [25]), (7, [-1]), (2, np.zeros(3, np.bool_)), (1, np.ones(3, np.int64)),
        (0, address[:2]), (3, memoryview(bytes(120))), (4, (-3,)), (5, (-32,)), (7, []),
    ):  # fmt: skip
        bad: list[Any] = [*good]
        bad[at] = value
        with pytest.raises((ValueError, TypeError, BufferError, IndexError)):
            helper.write_rows(*bad)


def test_rows_by_address_and_a_numpy_mask(helper: ModuleType) -> None:
    rows = torch.randn(4, 8)
    address = np.arange(4, dtype=np.int64) * 32 + rows.data_ptr()
    sources = HostRows(np.zeros(4, dtype=np.int64), address)
    native.helper = helper
    mask = np.array([True, False, True, True, True])
    made = plan_rows(sources, mask, 5, [8], dtype=torch.float32, device="cpu")
    assert torch.equal(made.rows[0], rows)  # type: ignore[arg-type]
    assert made.order.tolist() == [1, 0, 2, 3, 4]


# -- which is in use, and why ----------------------------------------------------------------------


def in_a_process(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **variables},
    )


SHOW = "from mmqwen_kernels import native; print(native.select_native())"


def test_the_variable_turns_it_off() -> None:
    done = in_a_process(SHOW, MMQWEN_NATIVE="0")
    assert "in_use=False, reason='MMQWEN_NATIVE=0'" in done.stdout, done.stderr
    done = in_a_process(SHOW, MMQWEN_NATIVE="maybe")
    assert "MMQWEN_NATIVE is 'maybe', expected 0 (off) or 1" in done.stderr


def test_a_helper_of_another_source_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path)
    module = load(path)
    assert module.source == native.checksum()
    changed = tmp_path / "_native.c"
    changed.write_bytes(native.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    monkeypatch.setattr(native, "checksum", lambda: native.zlib.crc32(changed.read_bytes()))
    monkeypatch.setattr(native.importlib, "import_module", lambda name: module)
    found, reason = native._load()
    assert found is None
    assert "another source" in reason


def test_subinterpreters_are_refused(tmp_path: Path) -> None:
    path = build(tmp_path)
    code = (
        "import sys\n"
        "try: import _interpreters as api\n"
        "except ImportError: import _xxsubinterpreters as api\n"
        "made = api.create()\n"
        f"path = {str(path.parent)!r}\n"
        "run = f'import sys; sys.path.insert(0, {path!r}); import _native'\n"
        "run_it = getattr(api, 'exec', None) or api.run_string\n"
        "try: answer = run_it(made, run)\n"
        "except Exception as error: answer = error\n"
        "print(answer)\n"
    )
    done = in_a_process(code)
    refusals = ("main interpreter alone", "does not support loading in subinterpreters")  # 3.12 on
    assert any(words in done.stdout for words in refusals), done.stdout + done.stderr
