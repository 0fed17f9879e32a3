"""What Prometheus is told."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from latent_sft.serve.choice import Choice
from latent_sft.serve.worker import Worker

ROUTES = ("/v1/chat/completions", "/v1/completions")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """Counters of one server; see docs/serving.md."""

    def __init__(self, worker: Worker) -> None:
        self.registry = CollectorRegistry()

        def make(kind: type, name: str, text: str, labels: Sequence[str] = (), **options: object) -> object:
            return kind(f"latent_sft_{name}", text, labels, registry=self.registry, **options)

        self.requests = make(
            Counter, "requests", "Requests by route and status; 499: the client was gone.", ["route", "status"]
        )
        self.prompt = make(Counter, "prompt_tokens", "Tokens of prompts.")
        self.answer = make(Counter, "answer_tokens", "Tokens of answers.")
        self.thought = make(Counter, "latents", "Latents, or tokens of written thoughts.")
        self.seconds = make(Histogram, "request_seconds", "From a request to its end.", buckets=SECONDS)
        self.first = make(Histogram, "first_answer_seconds", "To the first text of a streamed answer.", buckets=SECONDS)
        self.queued = make(Histogram, "queue_seconds", "From a request to its place in the batch.", buckets=SECONDS)
        waiting = make(Gauge, "waiting", "Choices that wait for a place in the batch.")
        running = make(Gauge, "running", "Choices in the batch.")
        waiting.set_function(lambda: sum(job.began is None for job in worker.open))
        running.set_function(lambda: sum(job.began is not None for job in worker.open))

    def request(self, path: str, status: int) -> None:
        """Count a request that was answered."""
        self.requests.labels(path if path in ROUTES else "other", status).inc()

    def began(self, started: float) -> None:
        """Note that the first text of an answer was sent."""
        self.first.observe(time.monotonic() - started)

    def ended(self, choices: Sequence[Choice], started: float) -> None:
        """Count what a request has used, whether it came to its end or not."""
        self.seconds.observe(time.monotonic() - started)
        for choice in choices:
            if choice.job.began is not None:
                self.queued.observe(choice.job.began - started)
                self.prompt.inc(len(choice.job.prompt))
            self.answer.inc(choice.num_answer)
            self.thought.inc(choice.num_steps)

    def text(self) -> bytes:
        """Return all of it, as Prometheus reads it."""
        return generate_latest(self.registry)
