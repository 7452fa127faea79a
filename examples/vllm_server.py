"""Start the server on the demo's checkpoint, send it real handwritten digits, print its answers.

    mmqwen demo                      # once: makes demo-out/checkpoint
    python examples/vllm_server.py   # or: python examples/vllm_server.py path/to/checkpoint

A server that already runs is used instead with --url http://127.0.0.1:8000.
"""

import argparse
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError

from openai import OpenAI

from mmqwen.client import embeds_part
from mmqwen.demo import digits

LOG = Path("vllm_server.log")


@contextmanager
def server(checkpoint: str, port: int) -> Iterator[str]:
    """`mmqwen serve CHECKPOINT`, from ready to stopped."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mmqwen.serve", checkpoint, "--host", "127.0.0.1"]
    flags = ["--port", str(port), "--max-model-len", "1024", "--enforce-eager"]
    print(f"{' '.join(['mmqwen serve', *command[3:], *flags])}  (log: {LOG})")
    with LOG.open("w") as log:
        process = subprocess.Popen([*command, *flags], stdout=log, stderr=log)
    try:
        for _ in range(600):
            if process.poll() is not None:
                sys.exit(f"the server did not start; see {LOG}")
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except (URLError, OSError):
                time.sleep(0.5)
        else:
            sys.exit("the server did not answer within five minutes")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def read_digit(client: OpenAI, model: str, sample: digits.Sample) -> str:
    """Ask for one digit, its strokes and its profile sent as embeddings."""
    content = [
        embeds_part("strokes", sample.items["strokes"]),
        embeds_part("profile", sample.items["profile"]),
        {"type": "text", "text": digits.QUESTION},
    ]
    answer = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        max_tokens=4,
        temperature=0,
    )
    return answer.choices[0].message.content or ""


def ask(url: str, count: int) -> None:
    """Print the answers to some digits that the model has not been trained on."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    _, held_out = digits.load()
    right = 0
    for sample in held_out[:count]:
        answer = read_digit(client, model, sample).strip()
        right += answer == str(sample.label)
        print(f"a handwritten {sample.label}: the model reads {answer!r}")
    print(f"{right} of {count} right")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?", default="demo-out/checkpoint")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--url", help="a server that already runs")
    arguments = parser.parse_args()
    if arguments.url:
        ask(arguments.url, arguments.count)
        return
    with server(arguments.checkpoint, arguments.port) as url:
        ask(url, arguments.count)


if __name__ == "__main__":
    main()
