"""Thousands of requests, 64 at a time, with clients that leave, send nonsense or are killed."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from serve.running import reasoner_of, running
from serve.test_server import until

from latent_sft.serve import worker

CLIENT = Path(__file__).with_name("soak_client.py")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["latent", "explicit"])
def test_nothing_is_lost_and_memory_stays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_COT_TOKENS", 20)
    reasoner, draw = reasoner_of(kind), random.Random(0)
    problems = [" + ".join(str(draw.randrange(10)) for _ in range(draw.randrange(1, 60))) for _ in range(200)]
    expected = {problem: reasoner.generate(problem, max_cot_tokens=20).answer for problem in problems}  # one at a time
    (tmp_path / "expected.json").write_text(json.dumps(expected))

    def client(port: int, seed: int, count: int) -> subprocess.Popen:
        command = [sys.executable, str(CLIENT), str(port), str(seed), str(count), str(tmp_path / "expected.json")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    process, memory = psutil.Process(), []
    with running(reasoner, batch_size=16, most_waiting=48) as server:
        for part in range(4):
            victims = [client(server.port, 100 + part, 10_000)]
            clients = client(server.port, part, 600)
            while clients.poll() is None:
                time.sleep(draw.uniform(0.3, 1.5))
                victims[-1].kill()
                victims.append(client(server.port, 200 + len(victims), 10_000))
            for victim in victims:
                victim.kill()
                victim.communicate()
            counted = json.loads(clients.stdout.read())
            assert sum(counted.values()) == 600
            assert set(counted) == {"greedy", "sampled", "left", "refused"}, counted
            until(lambda: not server.worker.open)
            gc.collect()
            memory.append(process.memory_info().rss / 2**20)
        assert not server.worker._jobs and server.service.metrics.text()
    assert memory[-1] - memory[0] < 20, memory
