"""`python -m eval.serving CHECKPOINT`: throughput and latency of servers with 1, 8 and 32 clients.

Ours, the same one decoding one answer at a time, and `transformers serve` where its command is given. They are measured
in turns, so that other load on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from latent_sft.config.load import load_config
from latent_sft.config.presets import resolve_config
from latent_sft.data.synthetic import generate

MOST_LOAD = 0.5  # per core; more, and what else runs decides the numbers
START_SECONDS = 180
OWN = [sys.executable, "-m", "latent_sft.cli", "serve"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print a table; return 1 where the machine is busy."""
    parser = argparse.ArgumentParser(prog="python -m eval.serving", description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument(
        "--problems", type=Path, help="JSON lines with `problem` and `answer`; the quickstart's test set"
    )
    parser.add_argument("--transformers", metavar="COMMAND", help="of an environment with transformers[serving]")
    parser.add_argument("--clients", default="1,8,32", help="at once; several by commas")
    parser.add_argument("--requests", type=int, default=192, help="of every measurement")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement; the medians are shown")
    parser.add_argument("--template", default="{problem}\n", help="text of a prompt")
    parser.add_argument("--force", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args(argv)
    load = os.getloadavg()[0]
    if load > MOST_LOAD * (os.cpu_count() or 1) and not options.force:
        sys.stderr.write(f"the load is {load:.1f}: nothing is measured on a busy machine; wait, or add --force\n")
        return 1
    if options.problems:
        given = [json.loads(line) for line in options.problems.read_text(encoding="utf-8").splitlines()]
    else:
        synthetic = load_config(resolve_config("quickstart")).data.synthetic
        given = [{"problem": record.problem, "answer": record.answer} for record in generate(synthetic)["test"]]
    rows = [(options.template.format(**row), row["answer"]) for row in given]
    rows = [rows[i % len(rows)] for i in range(options.requests)]
    servers = {
        "latent-sft serve": [*OWN, options.checkpoint, "--max-waiting", "1000"],
        "the same, one at a time": [*OWN, options.checkpoint, "--max-waiting", "1000", "--batch-size", "1"],
    }
    if options.transformers:
        own = "serve --trust-remote-code --device cpu"
        servers["transformers serve"] = [*shlex.split(options.transformers), *shlex.split(own), options.checkpoint]
    found: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    with contextlib.ExitStack() as stack:
        ports = {name: stack.enter_context(running(command)) for name, command in servers.items()}
        for port in ports.values():
            measured(port, rows[:8], 1)
        for _ in range(options.repeats):
            for clients in map(int, options.clients.split(",")):
                for name, port in ports.items():
                    found.setdefault((name, clients), []).append(measured(port, rows, clients))
    table = [
        "| server | clients | requests/s | median (ms) | 95 % below (ms) | right (%) |",
        "|---|---|---|---|---|---|",
    ]
    for (name, clients), runs in found.items():
        rate, middle, high, right = map(statistics.median, zip(*runs, strict=True))
        table.append(f"| {name} | {clients} | {rate:.1f} | {middle:.1f} | {high:.1f} | {right:.1f} |")
    command = shlex.join(["python", "-m", "eval.serving", *(sys.argv[1:] if argv is None else argv)])
    facts = (
        f"`{command}`, {os.cpu_count()} cores, load {load:.1f} at the start and {os.getloadavg()[0]:.1f} at the end."
    )
    sys.stdout.write("\n".join([facts, "", *table]) + "\n")
    return 0


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[int]:
    """Run a server and yield its port once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"did not start: {shlex.join(command)}")
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(30)


def measured(port: int, rows: list[tuple[str, str]], clients: int) -> tuple[float, float, float, float]:
    """Return requests per second, median and 95th percentile of latency in milliseconds, and the share right."""
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        results = list(pool.map(lambda part: asked(port, part), [rows[i::clients] for i in range(clients)]))
    seconds = time.perf_counter() - began
    times, right = ([one for part in results for one in part[i]] for i in (0, 1))
    high = statistics.quantiles(times, n=20)[-1]
    return len(rows) / seconds, 1e3 * statistics.median(times), 1e3 * high, 100 * statistics.mean(right)


def asked(port: int, rows: list[tuple[str, str]]) -> tuple[list[float], list[bool]]:
    """Ask for one answer after another on one connection; return times and which were right."""
    times, right = [], []
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        for prompt, answer in rows:
            began = time.perf_counter()
            body = json.dumps({"prompt": prompt, "temperature": 0})
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
            times.append(time.perf_counter() - began)
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {text.decode()}")
            written = json.loads(text)["choices"][0]["text"]
            right.append(written.rpartition("</think>")[2].strip() == answer)
    return times, right


if __name__ == "__main__":
    sys.exit(main())
