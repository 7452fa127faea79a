"""Run by test_vllm_bank_updates: banks changed in engines of several processes.

    python run_bank_ranks.py tensor|pipeline|data

Two ranks of an offline engine, or a server of two engines; each prints what it found as JSON.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else a NUMA node a rank
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from bank_versions import asked, first_of, is_answer, sent, table, write
from mmqwen.vllm_plugin.bank_worker import BankWorker
from tiny import forget_training, make_composite

IDS = [0, 49, 7]
KEY = "key"


class FailingWorker(BankWorker):
    """Fails on the second rank for a file of that name."""

    rank: int
    parallel_config: Any

    def mmqwen_load_bank(self, number: int, fields: dict[str, str]) -> list[Any]:
        parallel = self.parallel_config
        engine = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
        if 1 in (self.rank, engine) and fields["file"].endswith("fails.bank"):
            return [False, "rank 1 has no room"]
        return super().mmqwen_load_bank(number, fields)


def offline(kind: str, folder: Path, files: dict[str, str]) -> None:
    from vllm import SamplingParams

    from engines import start
    from mmqwen.banks import BankError, update_bank

    ranks: dict[str, Any] = {f"{kind}_parallel_size": 2, "distributed_executor_backend": "mp"}
    if kind == "pipeline":  # see run_gpu_engine.engine_options
        ranks |= {
            "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"},
        }  # fmt: skip
    llm = start(
        forget_training(make_composite(folder / "model")),
        hf_overrides={
            "banks": {
                "items": {"file": files["first"]},
                "users": {"file": files["first"], "placement": "host"},
                "goods": {"file": files["first"], "placement": "projected"},
            }
        },
        worker_extension_cls="run_bank_ranks.FailingWorker",
        **ranks,
    )
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=8)

    def ask(prompt: Any) -> Any:
        return first_of(llm.generate(prompt, params, use_tqdm=False)[0])

    expected = [ask(sent(table(seed), IDS)) for seed in (0, 1)]
    assert not is_answer(*expected)
    updates = llm.llm_engine.renderer.bank_updates
    for bank in ("items", "users", "goods"):
        assert is_answer(ask(asked(bank, IDS)), expected[0])
        with pytest.raises(BankError, match=f"bank '{bank}': rank 1 has no room"):
            update_bank(llm, bank, files["fails"])
        assert is_answer(ask(asked(bank, IDS)), expected[0])
        for at in (1, 0, 1):
            change = update_bank(llm, bank, files[("first", "second")[at]])
            assert is_answer(ask(asked(bank, IDS)), expected[at])
            assert updates.leaving == 0, change
    print(json.dumps({"kind": kind, "ok": True}))


def served(folder: Path, files: dict[str, str]) -> None:
    import httpx

    from mmqwen.transport import encode_rows
    from servers import TINY_FLAGS, running

    flags = [
        *TINY_FLAGS, "--bank", f"items={files['first']}", "--bank-updates", str(folder),
        "--api-key", KEY, "--data-parallel-size", "2", "--api-server-count", "1",
        "--worker-extension-cls", "run_bank_ranks.FailingWorker",
    ]  # fmt: skip
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        running(make_composite(folder / "model"), folder / "log", flags) as server,
        httpx.Client(base_url=server.url, headers=headers, timeout=120) as client,
    ):

        def ask(part: Any) -> dict[str, float]:
            content = [{"type": "m1_embeds", "m1_embeds": part}, {"type": "text", "text": "?"}]
            body = {
                "model": "tiny", "messages": [{"role": "user", "content": content}],
                "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 8,
            }  # fmt: skip
            answer = client.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            first = answer.json()["choices"][0]["logprobs"]["content"][0]
            return {entry["token"]: entry["logprob"] for entry in first["top_logprobs"]}

        expected = [ask(encode_rows(table(seed)[IDS])) for seed in (0, 1)]
        for at in (1, 0, 1):
            file = Path(files[("first", "second")[at]]).name
            answer = client.post("/v1/banks/items", json={"file": file})
            assert answer.status_code == 200, answer.text
            for _ in range(8):  # of either engine
                assert is_answer(ask({"bank": "items", "ids": IDS}), expected[at])
        answer = client.post("/v1/banks/items", json={"file": "fails.bank"})
        assert answer.status_code == 400, answer.text
        assert "rank 1 has no room" in answer.text
        for _ in range(8):
            assert is_answer(ask({"bank": "items", "ids": IDS}), expected[1])
    print(json.dumps({"kind": "data", "ok": True}))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        made = {name: write(place, name, table(at)) for at, name in enumerate(("first", "second"))}
        made["fails"] = write(place, "fails", table(2))
        if sys.argv[1] == "data":
            served(place, made)
        else:
            offline(sys.argv[1], place, made)
