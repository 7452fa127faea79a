"""Banks that change while they are served: who began with a version ends with it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bank_versions import ROWS, TEXT, WIDTH, asked, first_of, is_answer, sent, table, write
from engines import TOLERANCE, reference, start, worst_difference
from mmqwen.banks import (
    BankBusyError,
    BankError,
    BankRows,
    UnknownBankError,
    open_bank,
    update_bank,
)
from mmqwen.modalities import parse_modalities
from tiny import make_composite

pytest.importorskip("vllm")

VERSIONS = 4


def start_with_banks(folder: Path) -> tuple[Any, dict[str, list[str]]]:
    """An engine of few blocks and small steps, a bank on the device and one on the host."""
    files = {
        "items": [write(folder, f"items-{at}", table(at)) for at in range(VERSIONS)],
        # In its file's own dtype, which is not the model's.
        "users": [
            write(folder, f"users-{at}", table(100 + at), dtype="float16") for at in range(VERSIONS)
        ],
    }
    llm = start(
        make_composite(folder / "model"),
        hf_overrides={
            "banks": {
                "items": {"file": files["items"][0]},
                "users": {"file": files["users"][0], "placement": "host"},
            }
        },
        enable_prefix_caching=True,
        max_num_batched_tokens=64,
        num_gpu_blocks_override=24,
        max_num_seqs=8,
    )
    return llm, files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("updates")


@pytest.fixture(scope="module")
def started(folder):
    return start_with_banks(folder)


@pytest.fixture
def llm(started):
    """The engine with the first versions and an empty cache."""
    found, files = started
    for name, versions in files.items():
        update_bank(found, name, versions[0])
    found.reset_prefix_cache()
    return found


@pytest.fixture
def files(started):
    return started[1]


def rows_of(bank: str, version: int) -> torch.Tensor:
    return table(version) if bank == "items" else table(100 + version).half().float()


def updates_of(llm: Any) -> Any:
    return llm.llm_engine.renderer.bank_updates


def loaded(llm: Any) -> int:
    """How many versions the worker holds."""
    return sum(served is not None for served in worker_model(llm)._banks._banks)


def worker_model(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.get_model()


def sampling(**fields: Any) -> Any:
    from vllm import SamplingParams

    given = {"temperature": 0.0, "max_tokens": 1, "logprobs": 8, "ignore_eos": True, **fields}
    return SamplingParams(**given)


def ask(llm: Any, prompt: Mapping[str, Any], **fields: Any) -> Any:
    return llm.generate(prompt, sampling(**fields), use_tqdm=False)[0]


def begin(llm: Any, name: str, prompt: Mapping[str, Any], **fields: Any) -> None:
    """Read a prompt now, and leave its request to `finish`."""
    from mmqwen.vllm_plugin import compat

    llm.llm_engine.add_request(name, compat.render(llm, prompt), sampling(**fields))


def finish(llm: Any) -> dict[str, Any]:
    done = {}
    while llm.llm_engine.has_unfinished_requests():
        done.update({out.request_id: out for out in llm.llm_engine.step() if out.finished})
    return done


@pytest.mark.parametrize("bank", ["items", "users"])
def test_another_version_gives_another_answer_and_shares_no_blocks(llm, files, bank):
    other = "users" if bank == "items" else "items"
    ids, text = list(range(40)), f"<|m1|> {TEXT} {TEXT}"
    first, stays = ask(llm, asked(bank, ids, text)), ask(llm, asked(other, ids, text))
    change = update_bank(llm, bank, files[bank][1])
    assert (change.bank, change.rows) == (bank, ROWS)
    assert [change.old, change.new] == [open_bank(file).version for file in files[bank][:2]]
    second = ask(llm, asked(bank, ids, text))
    assert first.num_cached_tokens == second.num_cached_tokens == 0
    assert not is_answer(first_of(second), first_of(first))
    # What was not updated, and what is now there again, is found.
    again, kept = ask(llm, asked(bank, ids, text)), ask(llm, asked(other, ids, text))
    assert again.num_cached_tokens >= 32
    assert kept.num_cached_tokens >= 32
    assert is_answer(first_of(kept), first_of(stays))
    update_bank(llm, bank, files[bank][0])
    back = ask(llm, asked(bank, ids, text))
    assert first_of(back) == first_of(first)
    assert back.num_cached_tokens >= 32
    llm.reset_prefix_cache()
    assert first_of(ask(llm, sent(rows_of(bank, 0), ids, text))) == first_of(first)
    assert first_of(ask(llm, sent(rows_of(bank, 1), ids, text))) == first_of(second)


def test_more_rows_and_other_keys(llm, folder):
    file = Path(write(folder, "more", table(7, rows=60)))
    with pytest.raises(Exception, match="id 59 of bank 'items', expected 0 to 49"):
        ask(llm, asked("items", [59]))
    update_bank(llm, "items", file)
    assert ask(llm, asked("items", [59])).outputs
    # The same rows under other names are the same version.
    file.with_name("more.bank.keys").write_text("".join(f"new-{row}\n" for row in range(60)))
    before = loaded(llm)
    change = update_bank(llm, "items", file)
    assert change.old == change.new
    assert loaded(llm) <= before
    named = {"prompt": "see <|m1|> now", "multi_modal_data": {}}
    named["multi_modal_data"]["m1"] = [BankRows("items", keys=["new-59"])]
    assert is_answer(first_of(ask(llm, named)), first_of(ask(llm, asked("items", [59]))))


def wrong_files(folder: Path) -> dict[str, tuple[str, str]]:
    narrow = write(folder, "narrow", table(5, width=23))
    scenes = write(folder, "scenes", table(5, width=40), modality="m2")
    cut = folder / "cut.bank"
    cut.write_bytes(Path(write(folder, "whole", table(6))).read_bytes()[:-8])
    nan = folder / "nan.safetensors"
    rows = table(5)
    rows[7, 3] = float("nan")
    save_file({"rows": rows}, nan)
    other = folder / "other.safetensors"
    save_file({"x": table(5)}, other)
    return {
        "width": (narrow, "rows are 23 wide, expected 24"),
        "modality": (scenes, "'m1' in the config and 'm2' in"),
        "truncated": (str(cut), "expected a whole safetensors file"),
        "NaN": (str(nan), "got NaN or Inf in row 7, expected finite"),
        "tensors": (str(other), "expected one called 'rows'"),
        "none": (str(folder / "none.bank"), "cannot be read as a bank"),
    }


def test_a_wrong_file_is_refused_by_name_and_the_old_version_stays(llm, files, folder):
    before, held = first_of(ask(llm, asked("items", [3, 4]))), loaded(llm)
    for file, words in wrong_files(folder).values():
        with pytest.raises(BankError, match=f"bank 'items': .*{words}"):
            update_bank(llm, "items", file)
    for name in ("itmes", "", 3):
        with pytest.raises(
            UnknownBankError, match=r"unknown bank .*expected one of \['items', 'us"
        ):
            update_bank(llm, name, files["items"][1])
    assert loaded(llm) <= held
    assert first_of(ask(llm, asked("items", [3, 4]))) == before
    with pytest.raises(TypeError, match=r"got a dict, expected a vllm\.LLM"):
        update_bank({}, "items", files["items"][1])


def test_a_worker_that_cannot_load_leaves_the_old_version_everywhere(llm, files, monkeypatch):
    banks = worker_model(llm)._banks
    before, held = first_of(ask(llm, asked("items", [3, 4]))), loaded(llm)

    def fail(served: Any) -> Any:
        yield
        raise MemoryError(f"no room for {served.bank.num_rows} rows")

    with monkeypatch.context() as patched:
        patched.setattr(banks, "_load", fail)
        with pytest.raises(BankError, match=r"bank 'items': .*no room for 50 rows"):
            update_bank(llm, "items", files["items"][1])
    assert loaded(llm) <= held
    assert not banks._loading
    assert first_of(ask(llm, asked("items", [3, 4]))) == before
    update_bank(llm, "items", files["items"][1])  # nothing is left that would stand in its way
    assert first_of(ask(llm, asked("items", [3, 4]))) != before


def test_a_version_that_would_take_a_step_s_memory_is_refused(llm, files, monkeypatch):
    """Of 10,000 bytes that the GPU has free, and 2,000 that torch keeps, a step has taken 9,000."""
    banks = worker_model(llm)._banks
    before = first_of(ask(llm, asked("items", [3, 4])))
    with monkeypatch.context() as patched:
        patched.setattr(banks, "_device", torch.device("cuda"))
        patched.setattr(banks, "_headroom", 0)
        for name, found in (
            ("mem_get_info", (10_000, 0)),
            ("memory_reserved", 32_000),
            ("memory_allocated", 30_000),
            ("max_memory_allocated", 39_000),
        ):
            patched.setattr(torch.cuda, name, lambda device, found=found: found)
        words = "bank 'items' of 4800 bytes does not fit into the 3000 that are free on the GPU"
        with pytest.raises(BankError, match=words):
            update_bank(llm, "items", files["items"][1])
    assert first_of(ask(llm, asked("items", [3, 4]))) == before


def test_a_rank_that_is_done_waits_for_the_others(llm, files):
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
    banks = worker_model(llm)._banks
    fields = {"name": "items", "file": files["items"][2], "modality": "m1", "placement": "device"}
    fields["version"] = open_bank(fields["file"]).version
    held, number = loaded(llm), len(banks._banks)
    for _ in range(2):
        assert worker.mmqwen_load_bank(number, fields) == [True, ""]
        assert loaded(llm) == held + 1
        rows = banks._rows(banks._banks[number]).data_ptr()
    assert worker.mmqwen_load_bank(number, fields) == [True, ""]
    assert banks._rows(banks._banks[number]).data_ptr() == rows
    other = {**fields, "file": files["items"][1], "version": open_bank(files["items"][1]).version}
    assert worker.mmqwen_load_bank(number, other) == [True, ""]  # nobody dropped the first one
    assert loaded(llm) == held + 1
    assert worker.mmqwen_drop_bank(number) == [True, ""]
    assert loaded(llm) == held
    assert worker.mmqwen_drop_bank(number) == [True, ""]
    done, error = worker.mmqwen_load_bank(number, {**other, "version": "00"})
    assert not done
    assert "expected '00'" in error


def test_workers_that_load_no_banks_are_named(llm, files, monkeypatch):
    parallel = llm.llm_engine.vllm_config.parallel_config
    monkeypatch.setattr(parallel, "worker_extension_cls", "fractions.Fraction")
    with pytest.raises(BankError, match=r"'items': got worker_extension_cls 'fractions.Fraction'"):
        update_bank(llm, "items", files["items"][1])


def test_a_second_update_while_one_runs_is_refused(llm, files, monkeypatch):
    from mmqwen.banks.catalog import BankCatalog

    seen = []
    opens = BankCatalog.open_another

    def open_another(*args: Any) -> Any:
        # Not kept: its traceback would hold this frame, and what an update has replaced.
        with pytest.raises(BankBusyError, match="an update of a bank is running"):
            update_bank(llm, "users", files["users"][1])
        seen.append("users")
        return opens(*args)

    monkeypatch.setattr(BankCatalog, "open_another", open_another)
    update_bank(llm, "items", files["items"][1])
    assert seen == ["users"]
    assert updates_of(llm).catalog.banks["users"].bank.file == Path(files["users"][0])


def test_loading_in_pieces_lets_steps_run_between(llm, files, monkeypatch):
    """What is half loaded is found by nobody; requests go on meanwhile, on the old rows."""
    monkeypatch.setattr("mmqwen.banks.file.BLOCK_BYTES", 10 * WIDTH * 4)
    monkeypatch.setattr("mmqwen.vllm_plugin.bank_worker.STEP_SECONDS", 0.0)
    from mmqwen.vllm_plugin.bank_worker import BankWorker

    expected = first_of(ask(llm, asked("items", [1, 49])))
    answers = []
    load = BankWorker.mmqwen_load_bank

    def load_and_ask(self: Any, *args: Any) -> Any:
        answers.append(first_of(ask(llm, asked("items", [1, 49], f"{len(answers)} see <|m1|>"))))
        return load(self, *args)

    monkeypatch.setattr(BankWorker, "mmqwen_load_bank", load_and_ask)
    update_bank(llm, "items", files["items"][1])
    assert len(answers) >= ROWS // 10
    for at, answer in enumerate(answers):
        prompt = sent(rows_of("items", 0), [1, 49], f"{at} see <|m1|>")
        assert is_answer(answer, first_of(ask(llm, prompt)))
    assert not is_answer(first_of(ask(llm, asked("items", [1, 49]))), expected)


@pytest.mark.parametrize("bank", ["items", "users"])
def test_a_request_that_runs_finishes_on_the_rows_it_began_with(llm, files, bank):
    """Its prompt is read in pieces of 64 tokens, before the swap and after it."""
    model = reference(str(llm.llm_engine.model_config.model))
    ids = [at % ROWS for at in range(150)]
    begin(llm, "old", asked(bank, ids), max_tokens=4, logprobs=1)
    llm.llm_engine.step()
    assert llm.llm_engine.has_unfinished_requests()
    update_bank(llm, bank, files[bank][1])
    begin(llm, "new", asked(bank, ids), max_tokens=4, logprobs=1)
    llm.llm_engine.step()
    update_bank(llm, bank, files[bank][2])
    begin(llm, "newest", asked(bank, ids), max_tokens=4, logprobs=1)
    assert updates_of(llm).leaving >= 2
    assert loaded(llm) >= 4
    done = finish(llm)
    for version, name in enumerate(("old", "new", "newest")):
        items = {"m1": [rows_of(bank, version)[ids]]}
        assert worst_difference(done[name], model, items) <= TOLERANCE
    # The worker forgets a finished request at its next step.
    ask(llm, {"prompt": "a text"})
    llm.llm_engine.renderer.let_banks_go(llm)
    assert updates_of(llm).leaving == 0
    assert loaded(llm) == 2


def test_a_prompt_that_was_read_before_an_update_keeps_its_rows(llm, files):
    """Nothing runs yet, and what was read may run at any time, and again."""
    from mmqwen.vllm_plugin import compat

    expected = first_of(ask(llm, asked("items", [8, 9])))
    rendered = compat.render(llm, asked("items", [8, 9]))
    update_bank(llm, "items", files["items"][1])
    for name in ("once", "twice"):
        llm.reset_prefix_cache()
        ask(llm, {"prompt": "a text"})
        llm.llm_engine.renderer.let_banks_go(llm)
        llm.llm_engine.add_request(name, rendered, sampling())
        assert is_answer(first_of(finish(llm)[name]), expected)
    del rendered
    ask(llm, {"prompt": "a text"})
    llm.llm_engine.renderer.let_banks_go(llm)
    assert updates_of(llm).leaving == 0


def test_requests_that_are_preempted_read_their_old_rows_again(llm, files):
    model = reference(str(llm.llm_engine.model_config.model))
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    original = scheduler._preempt_request

    def count(request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = count
    try:
        ids = {f"{at}": [(at + row) % ROWS for row in range(90)] for at in range(6)}
        for name, found in ids.items():
            begin(llm, name, asked("items", found, f"{name} <|m1|>"), max_tokens=60, logprobs=1)
        for _ in range(12):  # all are read, none is preempted yet
            llm.llm_engine.step()
        assert not preempted
        update_bank(llm, "items", files["items"][1])
        done = finish(llm)
    finally:
        scheduler._preempt_request = original
    assert preempted, "the cache was not small enough to preempt anything"
    for name, found in ids.items():
        items = {"m1": [rows_of("items", 0)[found]]}
        assert worst_difference(done[name], model, items) <= TOLERANCE


def test_a_conversation_s_tokens_stand_for_no_rows_that_were_replaced():
    """They are asked for again, as what was dropped from the cache is."""
    from mmqwen.banks.catalog import Life
    from mmqwen.vllm_plugin.held_packs import HeldPacks
    from mmqwen.vllm_plugin.named import InUse, hold

    class Item:
        pass

    old, other = Life(), Life()
    held = HeldPacks(1 << 20, keep=False)
    for name, life in (("a", old), ("b", other)):
        item = Item()
        hold(item, InUse(frozenset({life})))
        held.put(name, item, 10, None)
    held.put("c", Item(), 10, None)
    before = held.nbytes
    held.forget(old)
    assert [held.has(name) for name in "abc"] == [False, True, True]
    assert held.nbytes < before
    assert [use.lives for use in held.banks_of("abc")] == [{other}]


# -- under load ----------------------------------------------------------------------------------


def run_load(llm: Any, files: Mapping[str, Sequence[str]], number: int, seed: int = 0) -> int:
    """Requests at random, with updates at random between steps; each answer is looked at.

    Returns:
        How many updates there were.
    """
    draw = random.Random(seed)
    names = list(files)
    cases = [
        (bank, version, first, count)
        for bank in names
        for version in range(VERSIONS)
        for first in range(0, 20, 4)
        for count in (1, 5, 30)
    ]
    prompts = [
        sent(rows_of(bank, version), list(range(first, first + count)))
        for bank, version, first, count in cases
    ]
    expected = {
        case: first_of(output)
        for case, output in zip(
            cases, llm.generate(prompts, sampling(), use_tqdm=False), strict=True
        )
    }
    for bank, _, first, count in cases:  # else an answer would tell nothing
        of_versions = [expected[bank, version, first, count] for version in range(VERSIONS)]
        for at, one in enumerate(of_versions):
            assert not any(is_answer(one, other) for other in of_versions[:at])
    current = dict.fromkeys(names, 0)
    running: dict[str, tuple[Any, ...]] = {}
    begun = done = updates = 0
    engine = llm.llm_engine
    while done < number:
        if draw.random() < 0.2:
            bank = draw.choice(names)
            current[bank] = draw.randrange(VERSIONS)
            update_bank(llm, bank, files[bank][current[bank]])
            updates += 1
        while begun < number and len(running) < 24 and draw.random() < 0.9:
            bank, first, count = draw.choice(names), 4 * draw.randrange(5), draw.choice((1, 5, 30))
            case = (bank, current[bank], first, count)
            tokens = draw.choice((1, 1, 1, 12))
            begin(
                llm, f"load-{seed}-{begun}", asked(bank, list(range(first, first + count))),
                max_tokens=tokens,
            )  # fmt: skip
            running[f"load-{seed}-{begun}"] = case
            begun += 1
        if draw.random() < 0.02 and running:  # a client leaves
            name = draw.choice(sorted(running))
            engine.abort_request([name])
            del running[name]
            done += 1
        for output in engine.step() if engine.has_unfinished_requests() else ():
            if output.finished and output.request_id in running:
                case = running.pop(output.request_id)
                assert is_answer(first_of(output), expected[case]), (output.request_id, case)
                done += 1
    return updates


def test_no_answer_is_wrong_while_banks_change(llm, files):
    assert run_load(llm, files, 300) > 5
    ask(llm, {"prompt": "a text"})
    llm.llm_engine.renderer.let_banks_go(llm)
    assert updates_of(llm).leaving == 0


@pytest.mark.fuzz
def test_no_answer_of_ten_thousand_is_wrong_while_banks_change(llm, files):
    assert run_load(llm, files, 10_000, seed=1) > 300


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "pipeline", "data"])
def test_all_ranks_change_or_none(kind):
    """Two processes each, over gloo; the last one is a server of two engines."""
    script = Path(__file__).with_name("run_bank_ranks.py")
    done = subprocess.run(
        [sys.executable, str(script), kind], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"kind": kind, "ok": True}


# -- the pipeline --------------------------------------------------------------------------------


def test_the_reference_engine_reads_the_new_rows(files, started, folder):
    from mmqwen import MultimodalQwen3Pipeline

    pipeline = MultimodalQwen3Pipeline(
        folder / "model", banks={"items": files["items"][0]}, engine="transformers", device="cpu"
    )

    def score(prompt: Mapping[str, Any]) -> float:
        return pipeline.score(prompt, [" engine"])[0].logprob

    texts = [score(asked("items", [2, 3]))]
    for version in (1, 2):
        change = update_bank(pipeline, "items", files["items"][version])
        assert change.new == open_bank(files["items"][version]).version
        texts.append(score(asked("items", [2, 3])))
        assert texts[-1] == score(sent(rows_of("items", version), [2, 3]))
    assert len(set(texts)) == 3
    with pytest.raises(BankError, match="23 wide, expected 24"):
        pipeline.update_bank("items", wrong_files(folder)["width"][0])
    assert score(asked("items", [2, 3])) == texts[-1]


def test_a_version_beyond_the_range_of_the_model_s_dtype_is_refused(files, folder):
    from mmqwen.banks import BankCatalog, parse_banks

    large = write(folder, "large", table(0) * 1e5)
    specs = parse_modalities({"m1": WIDTH})
    catalog = BankCatalog(parse_banks({"items": files["items"][0]}), specs, torch.float16)
    with pytest.raises(BankError, match=r"bank 'items': .*beyond the range of float16"):
        catalog.open_another("items", large, 1)
    assert catalog.banks["items"].bank.num_rows == ROWS


if __name__ == "__main__":  # requests [seed]: what the fuzz test does, as long as you like
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        made = start_with_banks(Path(name))
        count = int(sys.argv[1])
        print(
            json.dumps(
                {"requests": count, "updates": run_load(*made, count, *map(int, sys.argv[2:]))}
            )
        )
