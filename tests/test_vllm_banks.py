"""Rows of banks, served: by id and by value give one answer; other rows, another one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bank_tables import pack_named
from safetensors.torch import load_file

from engines import TOLERANCE, reference, start, worst_difference
from mmqwen.banks import (
    BankCatalog,
    BankError,
    BankRows,
    build_bank,
    open_bank,
    parse_banks,
    update_bank,
)
from mmqwen.modalities import ModalitySpec
from mmqwen.pack_slices import find_rows
from mmqwen.packs import PackError, allocate_pack, bank_group, directory, write_ids
from mmqwen.transport import encode_rows
from mmqwen_kernels import Projector, fuse_embeddings, native, plan_rows, project_rows
from tiny import forget_training, make_composite

pytest.importorskip("vllm")

from mmqwen.vllm_plugin.banks import Projection, ResidentBanks

SIZES = {"items": (50, 24), "users": (30, 24), "scenes": (20, 40)}
SIZES |= {"goods": (35, 24), "places": (15, 40)}
MODALITIES = {name: "m1" if width == 24 else "m2" for name, (_, width) in SIZES.items()}
PROJECTED = ("goods", "places")


def rows_of_bank(name):
    seed = sorted(SIZES).index(name)
    return torch.randn(SIZES[name], generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def banks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("banks")
    files = {}
    for name in SIZES:
        np.save(folder / f"{name}.npy", rows_of_bank(name).numpy())
        files[name] = folder / f"{name}.bank"
        keys = folder / f"{name}.txt"
        keys.write_text("".join(f"{name}-{row}\n" for row in range(SIZES[name][0])))
        dtype = "float16" if name == "users" else None  # on the host, of another dtype
        build_bank(
            folder / f"{name}.npy", files[name], modality=MODALITIES[name], keys=keys, dtype=dtype
        )
    return files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return forget_training(make_composite(tmp_path_factory.mktemp("banks") / "model"))


@pytest.fixture(scope="module")
def llm(checkpoint, banks):
    named = {
        "items": {"file": str(banks["items"])},
        "users": {"file": str(banks["users"]), "placement": "host"},
        "scenes": {"file": str(banks["scenes"]), "placement": "host", "modality": "m2"},
        **{name: {"file": str(banks[name]), "placement": "projected"} for name in PROJECTED},
    }
    return start(checkpoint, hf_overrides={"banks": named}, enable_prefix_caching=True)


def by_value(items):
    def rows(item):
        if not isinstance(item, BankRows):
            return item
        table = rows_of_bank(item.bank)
        if item.bank == "users":
            table = table.half().float()
        ids = item.ids
        if ids is None:
            ids = [int(key.rpartition("-")[2]) for key in item.keys]
        return table[torch.as_tensor(ids).long()]

    return {name: [rows(item) for item in members] for name, members in items.items()}


def ask(llm, prompt, items, **options):
    from vllm import SamplingParams

    fields = {"temperature": 0.0, "max_tokens": 4, "logprobs": 1, "ignore_eos": True, **options}
    request = {"prompt": prompt, "multi_modal_data": items}
    return llm.generate(request, SamplingParams(**fields), use_tqdm=False)[0]


def answer(output):
    sampled = output.outputs[0]
    return sampled.token_ids, [
        entry.logprob for step in sampled.logprobs for entry in step.values()
    ]


def assert_same(by_id, plain, *, bits):
    """By id and by value; a CPU's products have other roundings where the batch is another."""
    (tokens, one), (expected, other) = answer(by_id), answer(plain)
    assert tokens == expected
    assert one == (other if bits else pytest.approx(other, abs=TOLERANCE))


def draw(rows, width, seed=9):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


CASES = {
    "one item": ("see <|m1|> now", {"m1": [BankRows("items", [5, 17, 9])]}),
    "the same row twice": ("see <|m1|> now", {"m1": [BankRows("items", [3, 3, 49, 0])]}),
    "no markers": ("see it now", {"m1": [BankRows("items", [1])], "m2": [BankRows("scenes", [2])]}),
    "beside rows sent": (
        "a <|m1|> b <|m1|> c <|m2|> d <|m1|> e <|m2|>",
        {
            "m1": [draw(3, 24), BankRows("items", [7, 8]), draw(1, 24, 10)],
            "m2": [BankRows("scenes", [4, 4, 1]), draw(2, 40)],
        },
    ),
    "two banks of a modality, one on the host in half precision": (
        "<|m1|> and <|m1|> and <|m1|>",
        {"m1": [BankRows("users", [29, 0]), BankRows("items", [2]), BankRows("users", [1])]},
    ),
    "keys": ("by <|m2|> key", {"m2": [BankRows("scenes", keys=["scenes-19", "scenes-0"])]}),
    "arrays": (
        "by <|m1|> array <|m1|>",
        {
            "m1": [
                BankRows("items", np.array([4, 5], np.uint8)),
                BankRows("items", torch.tensor([6])),
            ]
        },
    ),
    "projected": ("see <|m1|> now", {"m1": [BankRows("goods", [34, 0, 34, 7])]}),
    "projected, beside rows sent and rows of both other placements": (
        "a <|m1|> b <|m2|> c <|m1|> d <|m1|> e <|m2|> f <|m1|>",
        {
            "m1": [
                BankRows("goods", [1, 2]),
                draw(2, 24),
                BankRows("items", [9]),
                BankRows("users", [8, 8]),
            ],
            "m2": [BankRows("places", keys=["places-14"]), BankRows("scenes", [3])],
        },
    ),
    "as JSON": ("by <|m1|> dict", {"m1": [{"bank": "items", "ids": [11, 12]}]}),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_by_id_and_by_value_give_the_same_bits(llm, checkpoint, case):
    prompt, items = CASES[case]
    named = {
        name: [BankRows(**item) if isinstance(item, dict) else item for item in members]
        for name, members in items.items()
    }
    sent = by_value(named)
    llm.reset_prefix_cache()
    by_id, plain = ask(llm, prompt, items), ask(llm, prompt, sent)
    named_banks = {i.bank for of in named.values() for i in of if isinstance(i, BankRows)}
    assert_same(by_id, plain, bits=named_banks.isdisjoint(PROJECTED))
    assert plain.num_cached_tokens == 0  # computed, and not looked up
    assert worst_difference(by_id, reference(str(checkpoint)), sent) <= TOLERANCE


def test_other_ids_give_another_answer_and_share_no_blocks(llm):
    llm.reset_prefix_cache()
    text = "<|m1|> " + "what does the sensor say about the engine? " * 3
    first = ask(llm, text, {"m1": [BankRows("items", list(range(40)))]})
    again = ask(llm, text, {"m1": [BankRows("items", list(range(40)))]})
    other = ask(llm, text, {"m1": [BankRows("items", list(range(1, 41)))]})
    bank = ask(llm, text, {"m1": [BankRows("users", list(range(30)))]})
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens > 0
    assert other.num_cached_tokens == bank.num_cached_tokens == 0
    (tokens, expected), (hit, read) = answer(first), answer(again)
    assert hit == tokens
    assert read == pytest.approx(expected, abs=1e-4)  # a prefix hit rounds in another order
    assert answer(other)[1] != pytest.approx(expected, abs=1e-4)


def test_many_requests_in_one_batch(llm):
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=1, ignore_eos=True)
    named = [
        {"prompt": f"number {at} <|m1|> of", "multi_modal_data": {"m1": [BankRows("items", [at])]}}
        for at in range(12)
    ]
    sent = [
        {**prompt, "multi_modal_data": by_value(prompt["multi_modal_data"])} for prompt in named
    ]
    mixed = [(named, sent)[at % 2][at] for at in range(len(named))]
    results = [[answer(o) for o in llm.generate(p, params, use_tqdm=False)] for p in (named, mixed)]
    assert [tokens for tokens, _ in results[0]] == [tokens for tokens, _ in results[1]]
    for (_, one), (_, other) in zip(*results, strict=True):
        assert one == pytest.approx(other, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (BankRows("items", [1, 50]), ["id 50", "'items'", "0 to 49"]),
        (BankRows("items", [-1]), ["id -1", "0 to 49"]),
        (BankRows("items", [2**70]), ["'items'", "71 bits"]),
        (BankRows("items", [1.0]), ["the id 1.0", "integers"]),
        (BankRows("items", [True]), ["the id True"]),
        (BankRows("items", np.array([0.5])), ["float64"]),
        (BankRows("items", torch.tensor([[1]])), ["[1, 1]"]),
        (BankRows("items", "12"), ["'12'"]),
        (BankRows("items", []), ["0 rows"]),
        (BankRows("items", [1] * 10**6), ["1000000 rows", "1 to 1024"]),
        (BankRows("items"), ["both or none"]),
        (BankRows("items", [1], keys=["items-1"]), ["both or none"]),
        (BankRows("items", keys=["items-50"]), ["'items-50'", "one of the 50"]),
        (BankRows("items", keys=[7]), ["the key 7"]),
        (BankRows("items", keys="items-1"), ["a list of strings"]),
        (BankRows("itmes", [1]), ["unknown bank 'itmes'", "items"]),
        (BankRows("scenes", [1]), ["'scenes'", "modality 'm2'"]),
        ({"bank": "items"}, ["fields"]),
        ({"bank": "items", "ids": [1], "extra": 1}, ["extra"]),
        ({"bank": None, "ids": [1]}, ["unknown bank None"]),
    ],
)
def test_a_wrong_name_is_refused_and_the_engine_goes_on(llm, item, words):
    with pytest.raises(Exception, match="modality 'm1', item 1") as caught:
        ask(llm, "a <|m1|> b <|m1|>", {"m1": [draw(1, 24), item]})
    for word in words:
        assert word in str(caught.value)
    assert ask(llm, "a <|m1|>", {"m1": [BankRows("items", [1])]}).outputs[0].token_ids


def test_messages_of_rows_sent_count_the_items_beside_named_ones(llm):
    wrong = torch.full((1, 24), float("nan"))
    items = {"m1": [BankRows("items", [1]), draw(1, 24), BankRows("items", [2]), wrong]}
    with pytest.raises(Exception, match="modality 'm1', item 3: got NaN"):
        ask(llm, "a " + "<|m1|> " * 4, items)
    with pytest.raises(Exception, match="modality 'm1', item 1: got rows of width 23"):
        ask(llm, "a <|m1|> <|m1|>", {"m1": [BankRows("items", [1]), draw(1, 23)]})


def test_chat_parts_name_rows_as_http_does(llm):
    from vllm import SamplingParams

    def say(part):
        content = ["look ", {"type": "m1_embeds", "m1_embeds": part}, " here"]
        content = [{"type": "text", "text": p} if isinstance(p, str) else p for p in content]
        params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=1, ignore_eos=True)
        llm.reset_prefix_cache()
        return answer(llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)[0])

    expected = say(encode_rows(rows_of_bank("items")[[5, 17]]))
    assert say({"bank": "items", "ids": [5, 17]}) == expected
    assert say({"bank": "items", "keys": ["items-5", "items-17"]}) == expected
    assert say({"bank": "items", "ids": [5, 18]}) != expected
    for part, words in (
        ({"bank": "items", "ids": [50]}, "id 50 of bank 'items'"),
        ({"bank": "items", "ids": [[1]]}, "the id a list"),
        ({"bank": "items", "ids": [1], "keys": ["items-1"]}, "fields"),
        ({"bank": "other", "ids": [1]}, "unknown bank 'other'"),
        ({"bank": {}, "ids": [1]}, "unknown bank a dict"),
    ):
        with pytest.raises(ValueError, match=words):
            say(part)


def test_packs_that_bypass_the_door_reach_no_memory_outside_the_bank(llm):
    """Ids become addresses; a pack may come by the token API. Also what a worker holds."""
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner.model
    banks = model._banks
    version = banks._banks[0].bank.version

    def pack(modality=0, bank=0, ids=(1, 2), version=version):
        group = bank_group(modality, bank)
        made, _ = allocate_pack([group], [len(ids)], {group: (len(ids), 24)}, torch.float32)
        write_ids(made, group, np.array(ids), version)
        return made

    good = model._packs.open(pack())
    found = find_rows([good], model._packs.widths, torch.float32, banks)
    table = banks._rows(banks._banks[0])
    assert (found.address - table.data_ptr()).tolist() == [96, 192]
    for wrong in (pack(bank=3), pack(bank=2), pack(version="00" * 32), pack(bank=(1 << 20) - 1)):
        opened = model._packs.open(wrong)
        assert len(opened) == llm.model_config.max_model_len  # rows of zeros
    for ids in ((1, 50), (2**32 - 1, 0)):
        part = model._packs.open(pack(ids=ids))
        with pytest.raises(PackError, match="outside its bank"):
            find_rows([part], model._packs.widths, torch.float32, banks)
        rows = model._packs.find([part], torch.float32)
        widths = model._packs.widths
        plan = plan_rows(rows, range(2), 2, widths, dtype=torch.float32, device="cpu")
        assert not plan.rows[0].any()


def test_the_flag_of_serve_stands_beside_the_checkpoint_s_banks(banks, tmp_path, monkeypatch):
    from argparse import Namespace

    from mmqwen.serve import ServeError, add_banks

    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "banks": {"items": {"file": "a"}, "old": {"file": "b"}}})
    )
    monkeypatch.chdir(tmp_path)

    def args(*flags, overrides=None):
        return Namespace(
            bank=list(flags), hf_overrides=overrides or {}, model_tag=str(tmp_path), revision=None
        )

    given = args("items=new.bank:placement=host", overrides={"max_position_embeddings": 7})
    add_banks(given)
    assert given.hf_overrides == {
        "max_position_embeddings": 7,
        "banks": {
            "items": {"file": str(tmp_path / "new.bank"), "placement": "host"},
            "old": {"file": "b"},
        },
    }
    wrong = {"NAME=FILE": ["items"], "one of": ["a=b:placement=moon"], "twice": ["a=b"] * 2}
    for words, flags in wrong.items():
        with pytest.raises(ServeError, match=words):
            add_banks(args(*flags))


def test_a_checkpoint_s_bank_is_settled_before_any_process_starts(banks, checkpoint, tmp_path):
    from types import SimpleNamespace

    from mmqwen.vllm_plugin.engine_config import BANK_WORKER, settle_banks

    (tmp_path / "mine.bank").symlink_to(banks["items"])

    def settle(**fields):
        text = SimpleNamespace(vocab_size=500, hidden_size=64)
        config = SimpleNamespace(
            text_config=text,
            modalities={"m1": {"dim": 24, "token_id": 400}},
            banks={"items": {"file": "mine.bank", **fields}},
        )
        model_config = SimpleNamespace(
            hf_config=config, model=str(tmp_path), dtype=torch.bfloat16, tokenizer=None
        )
        parallel = SimpleNamespace(worker_extension_cls="")
        vllm_config = SimpleNamespace(model_config=model_config, parallel_config=parallel)
        settle_banks(vllm_config)
        settle_banks(vllm_config)  # as a worker does, which then holds the file to its version
        assert parallel.worker_extension_cls == BANK_WORKER
        return config.banks["items"]

    found = settle()
    assert found["file"] == str(tmp_path / "mine.bank")
    assert found["version"] == open_bank(banks["items"]).version
    with pytest.raises(BankError, match=r"bank 'items': .* expected '1234'"):
        settle(version="1234")
    with pytest.raises(BankError, match=r"bank 'items': no-such.bank: cannot be read"):
        settle(file="no-such.bank")


def test_new_weights_of_a_projector_reach_rows_that_were_projected(llm, checkpoint):
    """Whichever way they come, and a part of them too; never stale rows."""
    named = {"m1": [BankRows("goods", [3, 30])], "m2": [BankRows("places", [1])]}
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.model_runner.model
    weights = load_file(checkpoint / "projectors.safetensors")

    def both():
        llm.reset_prefix_cache()
        llm.llm_engine.reset_encoder_cache()
        by_id, plain = (ask(llm, "<|m1|> or <|m2|>", x) for x in (named, by_value(named)))
        assert_same(by_id, plain, bits=False)
        return answer(by_id)[1]

    before = both()
    name = "projectors.m1.linear_2.bias"
    model.load_weights([(name, weights[name] + 1.0)])
    partly = both()
    other = [(name, -tensor) for name, tensor in weights.items() if ".m2." in name]
    llm.collective_rpc("reload_weights", kwargs={"weights_iterator": other})
    wholly = both()
    llm.collective_rpc("reload_weights")
    assert both() == pytest.approx(before, abs=TOLERANCE)
    for one, two in ((before, partly), (partly, wholly)):
        assert one != pytest.approx(two, abs=10 * TOLERANCE)


def test_a_bank_that_is_projected_is_updated_as_others_are(llm, banks, tmp_path):
    other = rows_of_bank("goods")[:20] + 1.0
    np.save(tmp_path / "other.npy", other.numpy())
    build_bank(tmp_path / "other.npy", tmp_path / "other.bank", modality="m1")
    named = {"m1": [BankRows("goods", [19, 0]), BankRows("items", [1])]}
    first = ask(llm, "new <|m1|> and <|m1|>", named)
    update_bank(llm, "goods", tmp_path / "other.bank")
    sent = {"m1": [other[[19, 0]], rows_of_bank("items")[[1]]]}
    second = ask(llm, "new <|m1|> and <|m1|>", named)
    assert_same(second, ask(llm, "new <|m1|> and <|m1|>", sent), bits=False)
    assert answer(second)[1] != pytest.approx(answer(first)[1], abs=10 * TOLERANCE)
    with pytest.raises(Exception, match="id 20 of bank 'goods'"):
        ask(llm, "new <|m1|>", {"m1": [BankRows("goods", [20])]})
    update_bank(llm, "goods", banks["goods"])
    llm.reset_prefix_cache()
    assert_same(ask(llm, "new <|m1|> and <|m1|>", named), first, bits=False)


def resident_goods(banks, run=None, **ranks):
    """A rank's share of the bank `goods`, projected to 8 columns, 4 rows at a time."""
    catalog = BankCatalog(
        parse_banks({"goods": {"file": str(banks["goods"]), "placement": "projected"}}),
        {"m1": ModalitySpec("m1", 24)},
    )
    projection = Projection(run, 8, 4, **ranks)
    home = torch.nn.Module()
    return ResidentBanks(catalog, ["m1"], torch.float32, home=home, projection=projection)


def test_a_bank_is_not_projected_by_a_random_start(banks):
    resident = resident_goods(banks)
    resident.refuse_untrained(["m2"])
    with pytest.raises(BankError, match=r"bank 'goods', placement projected: .*'m1' is UNTRAINED"):
        resident.refuse_untrained(["m1"])


def test_a_bank_that_does_not_fit_is_refused(banks, monkeypatch):
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda:0"))
    for name, value in (
        ("mem_get_info", (575, 0)),
        ("memory_reserved", 0),
        ("memory_allocated", 0),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    words = "bank 'goods', projected, of 576 bytes does not fit into the 575 that"
    with pytest.raises(BankError, match=words):
        resident_goods(banks, ranks=2)


def test_a_version_that_comes_while_weights_change_is_projected_by_the_new_ones(banks):
    """Some blocks a call, as many on each rank: ranks wait for each other."""
    weight = torch.ones(8, 24)
    resident = resident_goods(banks, lambda _, rows: rows @ weight.T)
    resident.project({"m1"})
    fields = {"name": "goods", **resident.projected[0].spec.to_dict()}
    assert not resident.advance(1, fields, 1e9)  # there is room, and no rank waits yet
    assert not resident.advance(1, fields, 1e9)  # 8 blocks of 9
    weight *= 2
    resident.project({"m1"})
    while not resident.advance(1, fields, 0.0):
        assert len(resident.projected) == 1
    old, new = resident.projections()
    assert torch.equal(old, new)
    assert torch.equal(new, rows_of_bank("goods") @ weight.T)
    resident.drop(0)
    assert [rows.data_ptr() for rows in resident.projections()] == [new.data_ptr()]


@pytest.mark.parametrize("ranks", [1, 2, 3, 40])
def test_rows_that_were_projected_lie_once_over_the_ranks(banks, ranks, monkeypatch):
    """Each rank places its share of them and zeros elsewhere, so that the sum is the projection."""
    generator = torch.Generator().manual_seed(1)
    up, down, bias = (torch.randn(n, generator=generator) for n in ((80, 24), (8, 80), (8,)))
    projector = Projector(up, None, down, bias)
    ids = np.array([34, 0, 17, 18, 0])
    named = directory(pack_named([(0, 0, ids.tolist())], [24], torch.float32))
    total, held = torch.zeros(5, 8), []
    for rank in range(ranks):
        # Nothing to be summed: here each rank has all hidden units.
        resident = resident_goods(
            banks, lambda _, rows: project_rows(rows, projector), rank=rank, ranks=ranks
        )
        resident.project({"m1"})
        (table,) = resident.projections()
        with monkeypatch.context() as patch:
            patch.setattr(native, "helper", None)
            found = find_rows([named], [24], torch.float32, resident)
        assert found.projected.all()
        if native.helper is not None:  # says the same
            again = find_rows([named], [24], torch.float32, resident)
            assert (again.address == found.address).all()
            assert again.projected.all()
            assert again.tables[0].data_ptr() == found.tables[0].data_ptr() == table.data_ptr()
        plan = plan_rows(found, range(5), 5, [24], dtype=torch.float32, device="cpu")
        total += fuse_embeddings(
            torch.zeros(5, dtype=torch.int64), torch.zeros(1, 8), plan, [projector], backend="torch"
        )
        held.append(len(table))
    assert 35 <= sum(held) < 35 + ranks
    expected = project_rows(rows_of_bank("goods"), projector)[ids]
    assert torch.allclose(total, expected, atol=1e-4)


def test_a_reload_of_the_weights_leaves_the_banks_as_they_are(llm):
    llm.collective_rpc("reload_weights")
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()  # a reload empties the worker's cache of packs alone
    named = {"m1": [BankRows("items", [41, 3]), BankRows("users", [17])]}
    by_id = ask(llm, "after <|m1|> and <|m1|>", named)
    assert answer(by_id) == answer(ask(llm, "after <|m1|> and <|m1|>", by_value(named)))
