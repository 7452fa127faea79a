"""Serve tiny checkpoints under many configurations and check the answers; one JSON line each.

    python tests/run_gpu_engine.py bf16-v2 bf16-v1 fp8 --jobs 4 --time-limit 500 --json FILE
    python tests/run_gpu_engine.py --list

Each configuration runs in a process of its own, `--jobs` at a time (an engine's start is mostly the
CPU's work), and prints its line when it ends, so that a run that is cut keeps what it has. What is
checked:

- *spelled*: items that spell tokens are answered as those tokens (`spelling.py`), in one batch of
  `--requests` mixed requests; needs no reference, so it holds for quantised models too.
- *alone*: the same, requests one by one, with prompt log-probabilities.
- *step*: what one call of `embed_input_ids` launches: one collective with tensor parallelism and
  none without; on a GPU no synchronisation, and with the kernels two launches and one copy.
- *named*: the same, with the rows named by ids, of a bank of each placement.
- *again*: the spelled requests once more, where the prefix cache is on.
- *reference*: mixed requests against transformers, where `reference` gives a bound.
- between configurations of one `group`: the answers of the first and of each other one.

Without a GPU it runs the same on vllm-cpu, for those configurations that a CPU can serve.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


@dataclass(frozen=True)
class Configuration:
    """One engine.

    Attributes:
        dtype: of the model.
        options: of `LLM`.
        checkpoint: of `make_spelling_checkpoint`.
        env: environment variables.
        group: configurations of one group are compared with the first of them that ran.
        reference: largest difference from transformers, or None: not compared.
        bound: largest difference between spelled and plain tokens.
        lora: whether requests go through an adapter.
        preempted: whether requests must have been preempted.
        cpu: whether vllm-cpu can serve it.
        longest: tokens after which a prompt ends soon: hybrids cache whole blocks of 96 and more.
        banks: whether rows are also named by ids, of a bank of each placement.
    """

    dtype: str
    options: dict[str, Any] = field(default_factory=dict)
    checkpoint: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    group: str = ""
    reference: float | None = None
    bound: float = 0.02
    lora: bool = False
    preempted: bool = False
    cpu: bool = True
    longest: int = 60
    banks: bool = False


BF16_REFERENCE = 0.15
"""vLLM and transformers in bf16, 200 requests of 24 tokens on an H100: 0.110 by both runners and by
both of our backends (2026-11-24). Not the rows: the same requests as plain tokens are bit-equal."""
LORA_BOUND = 0.15
"""Largest difference of a batch with an adapter; 0.051 on an H100 (2026-11-24), 0 one by one."""
EAGER: dict[str, Any] = {"enforce_eager": True}
CHUNKED = {**EAGER, "max_num_batched_tokens": 64, "max_num_seqs": 8}
V1, V2 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}, {"VLLM_USE_V2_MODEL_RUNNER": "1"}
KERNELS = {"MMQWEN_BACKEND": "triton"}
TRITON_ATTENTION = {"attention_backend": "TRITON_ATTN"}
MOE, QWEN2 = {"family": "qwen3_moe"}, {"family": "qwen2"}
NEXT, QWEN35 = {"family": "qwen3_next"}, {"family": "qwen3_5_text"}
# A rank without a layer of each kind would lay out its cache in another way than the others.
FOUR_LAYERS = {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2}
QWEN35_MOE = {"family": "qwen3_5_moe_text"}
CACHED = {"enable_prefix_caching": True}
TWO_RANKS = {"distributed_executor_backend": "mp"}

CONFIGURATIONS: dict[str, Configuration] = {
    "bf16-v2": Configuration(
        "bfloat16", {}, env=V2, group="bf16", reference=BF16_REFERENCE, cpu=False
    ),
    "bf16-v1": Configuration("bfloat16", {}, env=V1, group="bf16", reference=BF16_REFERENCE),
    "bf16-eager": Configuration("bfloat16", EAGER, group="bf16"),
    "bf16-kernels": Configuration(
        "bfloat16", {}, env=KERNELS, group="bf16", reference=BF16_REFERENCE, cpu=False, banks=True
    ),
    "bf16-cached": Configuration("bfloat16", {"enable_prefix_caching": True}, group="bf16"),
    "bf16-chunked": Configuration(
        "bfloat16",
        {**CHUNKED, "enable_prefix_caching": True},
        group="bf16",
        reference=BF16_REFERENCE,
    ),
    "bf16-chunked-v1": Configuration("bfloat16", CHUNKED, env=V1, group="bf16", cpu=False),
    "bf16-preempted": Configuration(
        "bfloat16",
        {**EAGER, "num_gpu_blocks_override": 24, "max_model_len": 256},
        group="bf16",
        preempted=True,
    ),
    "bf16-preempted-kernels": Configuration(
        "bfloat16",
        {**EAGER, "num_gpu_blocks_override": 24, "max_model_len": 256},
        env=KERNELS,
        group="bf16",
        preempted=True,
        cpu=False,
    ),
    "bf16-lora": Configuration(
        "bfloat16", {"enable_lora": True, "max_lora_rank": 8}, lora=True, cpu=False
    ),
    "bf16-lora-eager": Configuration(
        "bfloat16", {**EAGER, "enable_lora": True, "max_lora_rank": 8}, lora=True
    ),
    "fp8": Configuration("bfloat16", {"quantization": "fp8"}, cpu=False),
    "fp8-kernels": Configuration("bfloat16", {"quantization": "fp8"}, env=KERNELS, cpu=False),
    "qwen2": Configuration("bfloat16", {}, checkpoint=QWEN2, group="qwen2"),
    "qwen2-fp32": Configuration(
        "float32", {**EAGER, **TRITON_ATTENTION}, checkpoint=QWEN2, reference=0.02
    ),
    "moe": Configuration("bfloat16", {}, checkpoint=MOE, group="moe"),
    "moe-eager": Configuration("bfloat16", EAGER, checkpoint=MOE, group="moe"),
    "fp32": Configuration(
        "float32", {**EAGER, **TRITON_ATTENTION}, group="fp32", reference=0.02, banks=True
    ),
    "bf16-tp2": Configuration(
        "bfloat16", {"tensor_parallel_size": 2, **TWO_RANKS}, group="bf16", reference=BF16_REFERENCE
    ),
    "bf16-tp2-kernels": Configuration(
        "bfloat16",
        {"tensor_parallel_size": 2, **TWO_RANKS},
        env=KERNELS,
        group="bf16",
        reference=BF16_REFERENCE,
        cpu=False,
        banks=True,
    ),
    "bf16-pp2": Configuration(
        "bfloat16",
        {"pipeline_parallel_size": 2, **TWO_RANKS},
        group="bf16",
        reference=BF16_REFERENCE,
    ),
    "moe-tp2": Configuration(
        "bfloat16", {"tensor_parallel_size": 2, **TWO_RANKS}, checkpoint=MOE, group="moe"
    ),
    "moe-ep2": Configuration(
        "bfloat16",
        {"tensor_parallel_size": 2, "enable_expert_parallel": True, **TWO_RANKS},
        checkpoint=MOE,
        group="moe",
        cpu=False,
    ),
    "fp32-tp2": Configuration(
        "float32", {**EAGER, "tensor_parallel_size": 2, **TWO_RANKS}, group="fp32", banks=True
    ),
    "fp32-pp2": Configuration(
        "float32", {**EAGER, "pipeline_parallel_size": 2, **TWO_RANKS}, group="fp32", banks=True
    ),
    "next": Configuration("bfloat16", CACHED, checkpoint=NEXT, group="next", longest=200),
    "next-chunked": Configuration(
        "bfloat16", {**CHUNKED, **CACHED}, checkpoint=NEXT, group="next", longest=200
    ),
    "next-eager": Configuration("bfloat16", EAGER, checkpoint=NEXT),
    "qwen35": Configuration("bfloat16", CACHED, checkpoint=QWEN35, group="qwen35", longest=200),
    "qwen35-v1": Configuration(
        "bfloat16", CACHED, checkpoint=QWEN35, env=V1, group="qwen35", longest=200, cpu=False
    ),
    "qwen35-kernels": Configuration(
        "bfloat16", CACHED, checkpoint=QWEN35, env=KERNELS, group="qwen35", longest=200, cpu=False
    ),
    "qwen35-chunked": Configuration(
        "bfloat16", {**CHUNKED, **CACHED}, checkpoint=QWEN35, group="qwen35", longest=200
    ),
    "qwen35-preempted": Configuration(
        "bfloat16",
        # Some CPUs' kernels read recurrent states in float32 alone: with half the heads, a block
        # of the cache holds few enough tokens for requests to need a second one.
        {
            **EAGER,
            "mamba_ssm_cache_dtype": "float32",
            "num_gpu_blocks_override": 24,
            "max_model_len": 256,
        },
        checkpoint={**QWEN35, "linear_num_value_heads": 2},
        preempted=True,
        longest=85,
    ),
    "qwen35-lora-eager": Configuration(
        "bfloat16",
        {**EAGER, "enable_lora": True, "max_lora_rank": 8},
        checkpoint=QWEN35,
        lora=True,
    ),
    "qwen35-fp8": Configuration("bfloat16", {"quantization": "fp8"}, checkpoint=QWEN35, cpu=False),
    "qwen35-moe": Configuration(
        "bfloat16", CACHED, checkpoint=QWEN35_MOE, group="qwen35-moe", longest=200
    ),
    "qwen35-moe-eager": Configuration("bfloat16", EAGER, checkpoint=QWEN35_MOE),
    "qwen35-tp2": Configuration(
        "bfloat16", {"tensor_parallel_size": 2, **TWO_RANKS}, checkpoint=QWEN35, cpu=False
    ),
    "qwen35-pp2": Configuration(
        "bfloat16",
        {"pipeline_parallel_size": 2, **TWO_RANKS},
        checkpoint={**QWEN35, **FOUR_LAYERS},
        cpu=False,
    ),
    "next-tp2": Configuration(
        "bfloat16", {"tensor_parallel_size": 2, **TWO_RANKS}, checkpoint=NEXT
    ),
    "next-pp2": Configuration(
        "bfloat16",
        {"pipeline_parallel_size": 2, **TWO_RANKS},
        checkpoint={**NEXT, **FOUR_LAYERS},
    ),
}
CHILD_SECONDS = 560
"""Most that one may take. A hybrid's kernels are tuned at its start, which takes minutes."""

_engines: list[Any] = []
"""Engines live until the process ends: freeing one tears down the process groups of all."""


def is_hybrid(configuration: Configuration) -> bool:
    """Whether its text model has recurrent layers."""
    from tiny import FAMILY_FIELDS

    return "layer_types" in FAMILY_FIELDS[configuration.checkpoint.get("family", "qwen3")]


def engine_options(configuration: Configuration, extra: dict[str, Any]) -> dict[str, Any]:
    """Options of `LLM` on this machine."""
    import torch

    options = {
        "dtype": configuration.dtype,
        "max_model_len": 512,
        "disable_log_stats": False,  # preemptions are read from the metrics
        "enable_prefix_caching": False,
        **configuration.options,
    }
    if torch.cuda.is_available():
        # No share of the memory: engines start side by side, and profiling would see the others.
        options = {"gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 2 << 30, **options}
        if is_hybrid(configuration) and find_spec("flashinfer") is None:
            options["additional_config"] = {"gdn_prefill_backend": "triton"}
    else:
        options = {"num_gpu_blocks_override": 256, **options, "enforce_eager": True}
        options.pop("attention_backend", None)
        options["block_size"] = 32
        if options.get("pipeline_parallel_size", 1) > 1:
            # vllm-cpu 0.32 makes the buffers of later ranks in the run that warms compilation up:
            # in eager mode the first request of any model fails there.
            options["enforce_eager"] = False
            options["compilation_config"] = {"mode": 2, "backend": "eager"}
        if configuration.preempted:
            options["num_gpu_blocks_override"] = 12
    return {**options, **extra}


def preemptions(llm: Any) -> int:
    """Preemptions since the engine's start."""
    return int(sum(m.value for m in llm.get_metrics() if m.name.startswith("vllm:num_preemptions")))


def runner_of(llm: Any) -> str:
    """Module of the model runner: `vllm.v1.worker.gpu.model_runner` is V2."""

    def name(worker: Any) -> str:
        return type(getattr(worker, "worker", worker).model_runner).__module__

    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    return str(llm.collective_rpc(name)[0])


def run_one(name: str, requests: int, extra: dict[str, Any], answers_file: Path | None) -> dict:
    """One configuration, in this process."""
    import torch
    from spelling import (
        answers_of,
        compare,
        make_bank,
        make_lora,
        make_pairs,
        make_spelling_checkpoint,
    )
    from torchvision_stand_in import import_qwen3_5
    from vllm import LLM, SamplingParams

    from mmqwen.banks.spec import PLACEMENTS
    from mmqwen.vllm_plugin import register

    configuration = CONFIGURATIONS[name]
    if is_hybrid(configuration):
        import_qwen3_5()
    register()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = make_spelling_checkpoint(
            Path(scratch) / "model", initializer_range=0.1, **configuration.checkpoint
        )
        adapter = None
        if configuration.lora:
            from vllm.lora.request import LoRARequest

            adapter = LoRARequest("random", 1, str(make_lora(Path(scratch) / "lora", checkpoint)))
        if configuration.banks:
            file = make_bank(Path(scratch) / "spell.bank", checkpoint)
            named = {place: {"file": str(file), "placement": place} for place in PLACEMENTS}
            extra = {"hf_overrides": {"banks": named}, **extra}
        llm = LLM(model=str(checkpoint), **engine_options(configuration, extra))
        _engines.append(llm)
        result: dict[str, Any] = {
            "configuration": name,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "ready_s": round(time.perf_counter() - begin, 1),
            "runner": runner_of(llm),
        }
        batch = SamplingParams(temperature=0, max_tokens=24, logprobs=5, ignore_eos=True)
        alone = SamplingParams(
            temperature=0, max_tokens=4, logprobs=5, prompt_logprobs=0, ignore_eos=True
        )

        def serve(prompts: list[Any], params: Any, lora: Any = adapter) -> Any:
            return llm.generate(prompts, params, use_tqdm=False, lora_request=lora)

        failures: list[str] = []
        if adapter is None:  # an adapter's table reads indices that vLLM sets for its own steps
            result["step"], wrong = _look_at_a_step(llm, configuration)
            failures += wrong
        pairs = make_pairs(checkpoint, requests, seed=1, longest=configuration.longest)
        begin = time.perf_counter()
        plain = answers_of(serve([text for text, _ in pairs], batch))
        before = preemptions(llm)
        spelled = answers_of(serve([rows for _, rows in pairs], batch))
        result["generate_s"] = round(time.perf_counter() - begin, 2)
        result["preemptions"] = [before, preemptions(llm) - before]
        result["spelled"] = asdict(compare(plain, spelled))
        # vLLM's LoRA kernels add parts of a sum by atomics: a batch's bits change from run to run.
        bound = LORA_BOUND if configuration.lora else configuration.bound
        if result["spelled"]["largest"] > bound:
            failures.append("spelled")
        if configuration.preempted and not min(result["preemptions"]):
            failures.append("nothing was preempted")

        result["alone"] = _one_by_one(serve, make_pairs(checkpoint, 12, seed=2), alone)
        if result["alone"]["largest"] > configuration.bound:
            failures.append("alone")

        if configuration.banks:
            named_pairs = make_pairs(checkpoint, requests, seed=1, banks=PLACEMENTS)
            result["named"] = asdict(
                compare(plain, answers_of(serve([rows for _, rows in named_pairs], batch)))
            )
            if result["named"]["largest"] > bound:
                failures.append("named")

        if configuration.options.get("enable_prefix_caching"):
            outputs = serve([rows for _, rows in pairs[:64]], batch)
            again = asdict(compare(plain[:64], answers_of(outputs)))
            again["cached_tokens"] = sum(output.num_cached_tokens or 0 for output in outputs)
            result["again"] = again
            # Another batch than the first one's: other shapes, so other roundings.
            if not again["cached_tokens"] or again["largest"] > 5 * configuration.bound:
                failures.append("again")
        if adapter is not None:
            bare = answers_of(serve([text for text, _ in pairs[:16]], batch, None))
            result["without_lora"] = asdict(compare(plain[:16], bare))
            if result["without_lora"]["largest"] < 0.01:
                failures.append("the adapter changed nothing")
        if configuration.reference is not None:
            result["reference"] = _against_reference(
                checkpoint, configuration, pairs[:200], spelled[:200], llm
            )
            if result["reference"]["largest"] > configuration.reference:
                failures.append("reference")
        if configuration.options.get("distributed_executor_backend"):
            llm.llm_engine.engine_core.shutdown()  # ranks that wait for work keep a CPU busy
    if answers_file is not None:
        answers_file.write_text(json.dumps(spelled))
    result["failures"] = failures
    result["ok"] = not failures
    return result


def _look_at_a_step(llm: Any, configuration: Configuration) -> tuple[dict[str, Any], list[str]]:
    """Collectives, kernels and synchronisations of one embedding step; see `embed_step.py`."""
    from embed_step import count_collectives, count_kernels

    ranks = configuration.options.get("tensor_parallel_size", 1)
    found: dict[str, Any] = llm.collective_rpc(count_collectives)[0]
    wrong = []
    if sum(found["collectives"].values()) != (1 if ranks > 1 else 0):
        wrong.append("collectives of a step")
    kernels = llm.collective_rpc(count_kernels)[0]
    if kernels is not None:
        found |= kernels
        if kernels["synchronised"]:
            wrong.append("a step waited for the GPU")
        fused = ranks == 1 and kernels["backend"] == "triton" and kernels["plain_table"]
        if fused and (kernels["kernels"] > 2 or kernels["copies"] > 1):
            wrong.append("kernels of a step")
    return found, wrong


def _one_by_one(serve: Any, pairs: Any, params: Any) -> dict[str, Any]:
    """Each request by itself in both forms, with the log-probabilities of the prompt's text."""
    from spelling import answers_of, compare

    first, second = [], []
    largest = 0.0
    for text, rows in pairs:
        plain, spelled = serve([text], params)[0], serve([rows], params)[0]
        first += answers_of([plain])
        second += answers_of([spelled])
        for at, ids in enumerate(spelled.prompt_token_ids):
            entry, other = plain.prompt_logprobs[at], spelled.prompt_logprobs[at]
            if entry is None or ids != plain.prompt_token_ids[at] or ids not in entry:
                continue
            a, b = entry[ids].logprob, other[ids].logprob
            if a != b:  # both -inf at placeholders
                largest = max(largest, abs(a - b))
    result = asdict(compare(first, second))
    result["prompt_largest"] = largest
    result["largest"] = max(largest, result["largest"])
    return result


def _against_reference(
    checkpoint: Path, configuration: Configuration, pairs: Any, answers: Any, llm: Any
) -> dict[str, Any]:
    """Largest and median difference of sampled tokens' log-probabilities from transformers'."""
    import torch

    from engines import rows_of
    from mmqwen.hf import MultimodalQwen3ForConditionalGeneration
    from mmqwen.modalities import expand_markers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MultimodalQwen3ForConditionalGeneration.from_pretrained(
        checkpoint, dtype=getattr(torch, configuration.dtype)
    )
    model = model.to(device).eval()
    worst: list[float] = []
    with torch.no_grad():
        for (_, request), (tokens, steps) in zip(pairs, answers, strict=True):
            items = request.get("multi_modal_data", {})
            counts = {name: [len(item) for item in value] for name, value in items.items()}
            prompt = expand_markers(request["prompt_token_ids"], model.specs, counts).token_ids
            ids = torch.tensor([prompt + tokens], device=device)
            embeddings = {name: rows.to(device) for name, rows in rows_of(items).items()}
            logits = model(ids, embeddings=embeddings).logits[0].float().log_softmax(-1)
            worst.append(
                max(
                    abs(float(logits[len(prompt) - 1 + k, t]) - steps[k][t])
                    for k, t in enumerate(tokens)
                )
            )
    return {
        "requests": len(worst),
        "largest": max(worst),
        "median": sorted(worst)[len(worst) // 2],
        "bound": configuration.reference,
    }


# -- many configurations -----------------------------------------------------------------------


def run_child(name: str, arguments: argparse.Namespace, scratch: Path, deadline: float) -> dict:
    """One configuration in a process of its own, or what went wrong."""
    command = [
        sys.executable, __file__, name, "--child", "--requests", str(arguments.requests),
        "--engine-options", arguments.engine_options, "--answers", str(scratch / f"{name}.json"),
    ]  # fmt: skip
    left = min(deadline - time.monotonic(), CHILD_SECONDS)
    if left < 10:
        return {"configuration": name, "ok": False, "failures": ["not started: no time left"]}
    env = {**os.environ, **CONFIGURATIONS[name].env}
    if CONFIGURATIONS[name].options.get("distributed_executor_backend"):
        # vllm-cpu wants a NUMA node a rank unless told; a GPU's engine ignores it.
        env.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # A session of its own: the engine's workers may outlive the process that started them.
    with (
        (scratch / f"{name}.out").open("w+") as out,
        (scratch / f"{name}.err").open("w+") as err,
        subprocess.Popen(
            command, stdout=out, stderr=err, text=True, env=env, start_new_session=True
        ) as child,
    ):
        try:
            child.wait(timeout=left)
        except subprocess.TimeoutExpired:
            return {
                "configuration": name,
                "ok": False,
                "failures": [f"no answer in {left:.0f} s"],
                "tail": (scratch / f"{name}.err").read_text()[-1000:],
            }
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
    stdout, stderr = ((scratch / f"{name}.{kind}").read_text() for kind in ("out", "err"))
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {
            "configuration": name,
            "ok": False,
            "failures": ["died"],
            "tail": stdout[-1000:] + stderr[-3000:],
        }
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def compare_groups(names: list[str], scratch: Path) -> list[dict[str, Any]]:
    """Answers of configurations of one group, each against the first."""
    from spelling import compare

    first: dict[str, tuple[str, Any]] = {}
    found = []
    for name in names:
        group, file = CONFIGURATIONS[name].group, scratch / f"{name}.json"
        if not group or not file.exists():
            continue
        answers = [
            (tokens, [{int(t): value for t, value in step.items()} for step in steps])
            for tokens, steps in json.loads(file.read_text())
        ]
        if group not in first:
            first[group] = (name, answers)
            continue
        other, reference = first[group]
        found.append({"compared": [other, name], **asdict(compare(reference, answers))})
    return found


def results_of(*arguments: str, timeout: float | None = None) -> list[dict[str, Any]]:
    """What this script finds, run with these arguments in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-4000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configurations", nargs="*", help="names; all that fit, unless given")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=1, help="engines at a time")
    parser.add_argument("--time-limit", type=float, default=500, help="seconds in all")
    parser.add_argument("--engine-options", default="{}", help="JSON, further LLM(...) options")
    parser.add_argument("--json", type=Path, help="file to which each line is added")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = set(arguments.configurations) - CONFIGURATIONS.keys()
    if unknown:
        parser.error(f"unknown {sorted(unknown)}, expected some of {list(CONFIGURATIONS)}")
    if arguments.list:
        print("\n".join(CONFIGURATIONS))
        return 0
    if arguments.child:
        (name,) = arguments.configurations
        extra = json.loads(arguments.engine_options)
        result = run_one(name, arguments.requests, extra, arguments.answers)
        print("RESULT " + json.dumps(result), flush=True)
        sys.stdout.flush()
        os._exit(0)  # engines take long to end, and nothing is left to save

    def report(line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print("RESULT " + text, flush=True)
        if arguments.json:
            with arguments.json.open("a") as out:
                out.write(text + "\n")

    import torch

    gpus = torch.cuda.device_count()  # does not start CUDA here
    names = arguments.configurations or [
        name
        for name, entry in CONFIGURATIONS.items()
        if (gpus > 1 or not entry.options.get("distributed_executor_backend"))
        and (gpus or entry.cpu)
    ]
    deadline = time.monotonic() + arguments.time_limit
    good = True
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        with ThreadPoolExecutor(arguments.jobs) as pool:
            tasks = [pool.submit(run_child, n, arguments, scratch, deadline) for n in names]
            for task in as_completed(tasks):
                result = task.result()
                good &= result["ok"]
                report(result)
        for line in compare_groups(names, scratch):
            report(line)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
