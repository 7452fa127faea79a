"""Different rows never share a cache entry; equal rows do."""

from __future__ import annotations

import pytest
import torch

from engines import TOLERANCE, reference, start, worst_difference
from tiny import make_composite

pytest.importorskip("vllm")

TEXT = "one <|m1|> two <|m2|> three " + "dog " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_composite(
        tmp_path_factory.mktemp("cache") / "model", modalities={"m1": 24, "m2": 24}
    )


@pytest.fixture(scope="module")
def llm(checkpoint):
    return start(checkpoint, enable_prefix_caching=True)


def serve(llm, checkpoint, prompt, items):
    from vllm import SamplingParams

    output = llm.generate(
        {"prompt": prompt, "multi_modal_data": items},
        SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True),
        use_tqdm=False,
    )[0]
    assert worst_difference(output, reference(str(checkpoint)), items) <= TOLERANCE
    return output


def rows(seed, count):
    return torch.randn(count, 24, generator=torch.Generator().manual_seed(seed))


def test_same_text_with_other_rows(llm, checkpoint):
    first = {"m1": [rows(1, 40)], "m2": [rows(2, 30)]}
    serve(llm, checkpoint, TEXT, first)
    assert serve(llm, checkpoint, TEXT, first).num_cached_tokens >= 64
    other = {"m1": [rows(3, 40)], "m2": first["m2"]}
    assert serve(llm, checkpoint, TEXT, other).num_cached_tokens == 0


@pytest.mark.parametrize("at", [0, 45, 79])
def test_one_row_changed_deep_inside_a_pack(llm, checkpoint, at):
    items = {"m1": [rows(4, 80)], "m2": [rows(5, 1)]}
    serve(llm, checkpoint, TEXT, items)
    changed = items["m1"][0].clone()
    changed[at, 3] += 2.0
    output = serve(llm, checkpoint, TEXT, {"m1": [changed], "m2": items["m2"]})
    assert output.num_cached_tokens == 0


def test_rows_of_another_modality_with_the_same_bytes(llm, checkpoint):
    a, b = rows(6, 40), rows(7, 40)
    serve(llm, checkpoint, "<|m1|> and <|m1|>", {"m1": [a, b]})
    serve(llm, checkpoint, "<|m2|> and <|m2|>", {"m2": [a, b]})
    serve(llm, checkpoint, "<|m1|> and <|m2|>", {"m1": [a], "m2": [b]})
    serve(llm, checkpoint, "<|m2|> and <|m1|>", {"m1": [a], "m2": [b]})


def test_same_bytes_in_another_shape(llm, checkpoint):
    """Two items of one row, and one item of two rows, expand to different prompts."""
    both = rows(8, 2)
    serve(llm, checkpoint, "<|m1|><|m1|>", {"m1": [both[0], both[1]]})
    serve(llm, checkpoint, "<|m1|>", {"m1": [both]})


def test_hash_frames_item_boundaries_modality_dtype_and_order():
    from mmqwen.packs import pack_rows
    from mmqwen.vllm_plugin.pack_items import content_hash

    a, b = rows(9, 2), rows(10, 2)
    half = a.to(torch.float16)
    cases = [
        ([(0, a), (0, b)], [2, 2]),
        ([(0, torch.cat([a, b]))], [4]),
        ([(0, a), (0, b)], [1, 3]),
        ([(0, b), (0, a)], [2, 2]),
        ([(0, a), (1, b)], [2, 2]),
        ([(1, a), (0, b)], [2, 2]),
        ([(1, a), (1, b)], [2, 2]),
        ([(0, half), (0, half)], [2, 2]),
        ([(0, half.view(torch.bfloat16)), (0, half.view(torch.bfloat16))], [2, 2]),
        ([(0, a.view(4, 12)), (0, b.view(4, 12))], [4, 4]),
    ]
    hashes = [content_hash(pack_rows(items), counts) for items, counts in cases]
    assert len(set(hashes)) == len(hashes)
    assert hashes[0] == content_hash(pack_rows(cases[0][0]), cases[0][1])


def test_the_hash_is_the_one_that_vllm_was_told():
    from types import SimpleNamespace

    from mmqwen.packs import pack_rows
    from mmqwen.vllm_plugin import compat
    from mmqwen.vllm_plugin.pack_items import content_hash

    pack = pack_rows([(0, rows(1, 3))])
    names = {a: content_hash(pack, [3], a) for a in ("blake3", "sha256", "sha512")}
    assert len(set(names.values())) == 3
    assert names["blake3"] == content_hash(pack, [3])
    assert [len(name) for name in names.values()] == [64, 64, 128]
    assert compat.hash_algorithm(SimpleNamespace(mm_hasher_algorithm="sha256")) == "sha256"


def test_a_clients_uuid_cannot_choose_the_cache_entry(llm, checkpoint):
    """vLLM would take `multi_modal_uuids` for the hash; a client could poison another's entry."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=4, logprobs=1, ignore_eos=True)
    for seed in (11, 12):
        items = {"m1": [rows(seed, 40)]}
        output = llm.generate(
            {
                "prompt": "<|m1|> poison " + "dog " * 40,
                "multi_modal_data": items,
                "multi_modal_uuids": {"m1": ["mine"]},
            },
            greedy,
            use_tqdm=False,
        )[0]
        assert worst_difference(output, reference(str(checkpoint)), items) <= TOLERANCE


def test_earlier_turns_stay_cached_while_their_rows_are_unchanged(llm, checkpoint):
    turn = "<|im_start|>user\n<|m1|> what is it " + "dog " * 30 + "<|im_end|>\n"
    first, second = rows(13, 40), rows(14, 40)
    serve(llm, checkpoint, turn, {"m1": [first]})
    output = serve(llm, checkpoint, turn * 2, {"m1": [first, second]})
    assert output.num_cached_tokens >= 64


def test_packs_are_named_by_content_only_where_something_is_reused(llm, tmp_path):
    """Without a prefix cache nothing looks for an earlier request's rows: no hash is made."""
    item = {"prompt_token_ids": [5, 6, 7], "multi_modal_data": {"m1": [rows(15, 4)]}}

    def names(engine):
        renderer = engine.llm_engine.renderer
        return [
            engine_input["mm_hashes"]["mmqwen_pack"][0]
            for engine_input in renderer.render_cmpl([dict(item), dict(item)])
        ]

    first, second = names(llm)
    assert first == second
    assert len(first) == 64
    uncached = start(make_composite(tmp_path / "model"), enable_prefix_caching=False)
    first, second = names(uncached)
    assert first != second
    assert len(first) == len(second) == 32


def test_vllms_processor_cache_is_off(llm):
    """Packs never take part in it; its engine half would keep gigabytes of them."""
    core = llm.llm_engine.engine_core.engine_core
    assert core.mm_receiver_cache is None


def test_packs_of_steps_in_flight_do_not_hold_up_the_next_step(checkpoint):
    """More rows than text, and a second and third step scheduled before the first is over."""
    from vllm import SamplingParams

    llm = start(
        checkpoint,
        max_num_batched_tokens=128,
        max_model_len=128,
        max_num_seqs=64,
        enable_prefix_caching=False,
    )
    for seed in range(20):
        llm.llm_engine.add_request(
            str(seed),
            {"prompt_token_ids": [5] * 8, "multi_modal_data": {"m1": [rows(seed, 24)]}},
            SamplingParams(max_tokens=1),
        )
    core = llm.llm_engine.engine_core.engine_core
    steps = [core.scheduler.schedule() for _ in range(3)]
    assert [step.total_num_scheduled_tokens for step in steps] == [128] * 3
    llm.llm_engine.abort_request([str(seed) for seed in range(20)])
