"""vLLM's log-probabilities against those of transformers, on a trained checkpoint.

    python benchmarks/bench_parity.py --checkpoint demo-out/checkpoint    # `mmqwen demo`
    python benchmarks/bench_parity.py                                     # trains one first: 25 s
    python benchmarks/bench_parity.py --checkpoint OUT --data DATA --adapter OUT/adapter

Held-out digits of the demo, or samples of a dataset (a conversation by the checkpoint's own chat
template), are served by vLLM in float32 and bfloat16, each in a process of its own; every
log-probability of a prompt's text token and of four generated ones is compared with that of the
transformers model on the same device, in the same dtype and in float32. Before that, `--requests`
prompts, every third of them text alone, are answered twice with the prefix cache on. Runs from a
checkout (PYTHONPATH=.:kernels): the plugin is registered by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from bench_kernels import HERE, about

RESULTS = HERE / "results"
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Prompt:
    """One prompt, as vLLM takes it and for transformers.

    Attributes:
        prompt: of `LLM.generate`.
        items: modality to its rows `[n, d]`, in the order of the slots.
        answer: what it should begin with.
    """

    prompt: dict[str, Any]
    items: dict[str, torch.Tensor]
    answer: str


def read_prompts(checkpoint: Path, data: Path | None, count: int) -> list[Prompt]:
    """Digits that are held out, or the first samples of a dataset, every third without its rows."""
    if data is None:
        from mmqwen.demo import digits

        held_out = digits.load()[1][:count]
        return [Prompt(sample.prompt, sample.items, str(sample.label)) for sample in held_out]
    from transformers import AutoTokenizer

    from mmqwen.data import RowsDataset

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    dataset = RowsDataset(data)
    prompts = []
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        text = example.sample.prompt
        if text is None:
            text = tokenizer.apply_chat_template(
                list(example.sample.messages[:-1]), add_generation_prompt=True, tokenize=False
            )
        rows = dict(example.rows)
        if index % 3 == 2:
            for name in rows:
                text = text.replace(f"<|{name}|>", "nothing")
            rows = {}
        prompt = {"prompt": text, "multi_modal_data": rows} if rows else {"prompt": text}
        items = {name: torch.cat([torch.as_tensor(r) for r in own]) for name, own in rows.items()}
        prompts.append(Prompt(prompt, items, example.sample.answers()[-1].strip()))
    return prompts


def start_engine(checkpoint: Path, dtype: str, *, lora: bool) -> tuple[Any, float]:
    """The engine, and the seconds that its start took."""
    from vllm import LLM

    from mmqwen.vllm_plugin import register

    register()
    options: dict[str, Any] = {"enforce_eager": True, "enable_prefix_caching": True}
    if torch.cuda.is_available():
        options |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 30}
        if dtype == "float32":  # FlashAttention has no float32
            options["attention_backend"] = "TRITON_ATTN"
    begin = time.perf_counter()
    llm = LLM(model=str(checkpoint), dtype=dtype, max_model_len=512, enable_lora=lora, **options)
    return llm, time.perf_counter() - begin


def answer_twice(llm: Any, prompts: list[Prompt], request: Any) -> dict[str, Any]:
    """The same prompts two times: whether answers are equal, and what the prefix cache gave."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=8)
    inputs = [p.prompt for p in prompts]
    begin = time.perf_counter()
    first = llm.generate(inputs, sampling, use_tqdm=False, lora_request=request)
    middle = time.perf_counter()
    again = llm.generate(inputs, sampling, use_tqdm=False, lora_request=request)
    end = time.perf_counter()
    same = [a.outputs[0].text == b.outputs[0].text for a, b in zip(first, again, strict=True)]
    right = [
        o.outputs[0].text.strip().startswith(p.answer)
        for o, p in zip(first, prompts, strict=True)
        if p.items
    ]
    return {
        "requests": len(prompts),
        "with_rows": len(right),
        "right_with_rows": round(sum(right) / len(right), 4),
        "same_again": sum(same),
        "cached_tokens": sum(o.num_cached_tokens or 0 for o in again),
        "prompt_tokens": sum(len(o.prompt_token_ids) for o in again),
        "seconds": [round(middle - begin, 2), round(end - middle, 2)],
    }


@torch.inference_mode()
def differences(outputs: list[Any], prompts: list[Prompt], model: Any) -> list[float]:
    """For each prompt the largest difference of any of its log-probabilities."""
    device = model.device
    placeholders = {spec.token_id for spec in model.specs.values()}
    found = []
    for output, sample in zip(outputs, prompts, strict=True):
        prompt, sampled = list(output.prompt_token_ids), output.outputs[0]
        ids = torch.tensor([[*prompt, *sampled.token_ids]], device=device)
        rows = {name: items.to(device) for name, items in sample.items.items()}
        logprobs = model(ids, embeddings=rows).logits[0].float().log_softmax(-1).cpu()
        theirs = [
            (len(prompt) + k, token, sampled.logprobs[k][token].logprob)
            for k, token in enumerate(sampled.token_ids)
        ]
        theirs += [
            (at, prompt[at], output.prompt_logprobs[at][prompt[at]].logprob)
            for at in range(1, len(prompt) if output.prompt_logprobs else 0)
            if prompt[at] not in placeholders  # masked: -inf on both sides
        ]
        found.append(max(abs(float(logprobs[at - 1, t]) - value) for at, t, value in theirs))
    return found


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine against the references."""
    import vllm
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from mmqwen.hf import MultimodalQwen3ForConditionalGeneration

    checkpoint, dtype, adapter = arguments.checkpoint, arguments.worker, arguments.adapter
    llm, start = start_engine(checkpoint, dtype, lora=adapter is not None)
    request = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    many = read_prompts(checkpoint, arguments.data, max(arguments.prompts, arguments.requests))
    result: dict[str, Any] = {
        "vllm_dtype": dtype,
        "engine_start_s": round(start, 1),
        "vllm": vllm.__version__,
        **answer_twice(llm, many, request),
        "prompts": arguments.prompts,
        "against": {},
    }
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=4,
        logprobs=1,
        prompt_logprobs=1 if adapter is None else None,  # vLLM's CPU adapters cannot
        ignore_eos=True,
    )
    few = many[: arguments.prompts]
    outputs = llm.generate([p.prompt for p in few], sampling, use_tqdm=False, lora_request=request)
    torch.backends.cuda.matmul.allow_tf32 = False
    for against in dict.fromkeys((dtype, "float32")):
        model: Any = MultimodalQwen3ForConditionalGeneration.from_pretrained(
            checkpoint, dtype=getattr(torch, against)
        )
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, adapter)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        worst = differences(outputs, few, model)
        result["against"][against] = {"largest": max(worst), "median": median(worst)}
    return result


def main(argv: list[str] | None = None) -> int:
    """Compare in both dtypes, print the table, write the file; 1 if an engine failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="of the demo; trained anew if left out")
    parser.add_argument("--data", type=Path, help="dataset that prompts are taken from")
    parser.add_argument("--adapter", type=Path, help="LoRA adapter that requests go through")
    parser.add_argument("--prompts", type=int, default=64, help="compared with transformers")
    parser.add_argument("--requests", type=int, default=64, help="answered twice")
    parser.add_argument("--seconds", type=float, default=175, help="engines are stopped then")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=DTYPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.worker:
        result = work(arguments)
        arguments.output.write_text(json.dumps(result))
        sys.stdout.flush()
        os._exit(0)  # engines take their time to end
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    output = arguments.output or RESULTS / f"parity-{device}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {**about(device), "results": [], "failed": []}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            from mmqwen.demo.train import train

            checkpoint = train(Path(scratch) / "checkpoint").output
            print(f"trained in {time.perf_counter() - start:.0f} s", flush=True)
        for dtype in DTYPES:
            part = Path(scratch) / f"{dtype}.json"
            command = [sys.executable, __file__, "--checkpoint", str(checkpoint)]
            command += ["--worker", dtype, "--output", str(part)]
            command += ["--prompts", str(arguments.prompts)]
            command += ["--requests", str(arguments.requests)]
            for option in ("data", "adapter"):
                if getattr(arguments, option) is not None:
                    command += [f"--{option}", str(getattr(arguments, option))]
            left = arguments.seconds - (time.perf_counter() - start)
            try:
                subprocess.run(command, check=True, timeout=max(left, 1))
                report["results"].append(json.loads(part.read_text()))
            except (subprocess.SubprocessError, OSError) as error:
                report["failed"].append({"vllm_dtype": dtype, "error": str(error)[-500:]})
            output.write_text(json.dumps(report, indent=1) + "\n")
    print("| vLLM | transformers | largest | median over prompts |\n|-|-|-|-|")
    for result in report["results"]:
        print({k: v for k, v in result.items() if k != "against"})
        for against, found in result["against"].items():
            print(
                f"| {result['vllm_dtype']} | {against} | {found['largest']:.2g} | "
                f"{found['median']:.2g} |"
            )
    for failure in report["failed"]:
        print(f"FAILED: {failure}")
    print(f"{output}, {time.perf_counter() - start:.0f} s")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
