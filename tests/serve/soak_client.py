"""Many requests of many kinds from threads of a process that may be killed: PORT SEED COUNT EXPECTED.json."""

from __future__ import annotations

import collections
import http.client
import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor

PATH, AT_ONCE = "/v1/chat/completions", 64
BAD = ["{", "[1]", '{"messages": 3}', '{"messages": [{"role": "user", "content": "1"}], "n": -1}', "\udcff"]


def one(port: int, draw: random.Random, expected: dict[str, str]) -> str:
    """Make a request; return how it went."""
    problem, stream = draw.choice(list(expected)), draw.random() < 0.5
    kind = draw.choices(["greedy", "sampled", "leaves", "bad"], [6, 2, 1, 1])[0]
    body = {"messages": [{"role": "user", "content": problem}], "stream": stream}
    if kind == "sampled":
        body |= {
            "temperature": draw.choice([0.5, 1.0]),
            "top_p": draw.choice([0.8, 1.0]),
            "n": 2,
            "logprobs": not stream,
        }
    text = draw.choice(BAD) if kind == "bad" else json.dumps(body)
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            connection.request(
                "POST", PATH, text.encode(errors="surrogateescape"), {"Content-Type": "application/json"}
            )
            if kind == "leaves":
                time.sleep(draw.random() * 0.05)
                return "left"
            response = connection.getresponse()
            found = response.read().decode()
        finally:
            connection.close()
        if response.status != 429:
            break
        time.sleep(draw.random() * 0.2)
    if kind == "bad":
        return "refused" if response.status == 400 and json.loads(found)["error"]["message"] else f"bad: {found}"
    if response.status != 200:
        return f"{response.status}: {found}"
    if not stream:
        choices = json.loads(found)["choices"]
        answers = [choice["message"]["content"] for choice in choices]
        ends = [choice["finish_reason"] for choice in choices]
    else:
        events = [line.removeprefix("data: ") for line in found.split("\n\n") if line]
        parts = [json.loads(event)["choices"][0] for event in events[:-1]]
        answers = ["".join(part["delta"].get("content", "") for part in parts)]
        ends = [part["finish_reason"] for part in parts if part["finish_reason"]]
        if events[-1] != "[DONE]":
            return f"cut: {found}"
    if not ends or not set(ends) <= {"stop", "length"}:
        return f"no end: {found}"
    return kind if kind == "sampled" or answers == [expected[problem]] else f"{problem}: {answers}"


def main() -> None:
    port, seed, count = map(int, sys.argv[1:4])
    with open(sys.argv[4], encoding="utf-8") as file:
        expected = json.load(file)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        runs = pool.map(lambda i: one(port, random.Random(f"{seed}/{i}"), expected), range(count))
        sys.stdout.write(json.dumps(collections.Counter(runs)))


if __name__ == "__main__":
    main()
