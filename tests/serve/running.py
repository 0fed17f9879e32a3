"""A server in a thread of the test, on random models of every way to think."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Iterator

import torch
import uvicorn
from openai import OpenAI

from latent_sft.config.schema import LatentConfig, PromptConfig, TinyModelConfig
from latent_sft.data.prompts import build_spec
from latent_sft.inference.show import Reasoner
from latent_sft.inference.solve import Thinker
from latent_sft.method.types import Mixtures, Soft, SpanCode, ThoughtSpec
from latent_sft.models.load import build_tiny
from latent_sft.models.thoughts import Thoughts
from latent_sft.models.tiny_tokenizer import build_tokenizer
from latent_sft.serve.answer import Service
from latent_sft.serve.metrics import Metrics
from latent_sft.serve.server import create_app, listen
from latent_sft.serve.worker import Worker

TOKENIZER = build_tokenizer(["0 1 2 3 4 5 6 7 8 9 +"], TinyModelConfig(), PromptConfig())
PROBLEMS = ("1", "2 + 3", "9", "1 + 2 + 3 + 4 + 5", "7 + 7", "8 + 1 + 0", "5 + 5", "0", "4 + 4 + 4", "6 + 1")
SEQUENTIAL, PARALLEL = (ThoughtSpec(num_latents=4, iterations=t, projection=True) for t in (4, 2))
KINDS = ("latent", "spans", "mixtures", "soft", "sequential", "parallel", "explicit", "none")


def tiny_model(**sizes: int):
    """Return a random model whose next token depends on the input, and which now and then ends by itself."""
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32} | sizes
    model = build_tiny(TinyModelConfig(tie_embeddings=False, **sizes), TOKENIZER, seed=0)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.7, generator=generator)
    return model.double().eval()  # or rounding, other in every batch, would grow with every mixture fed back


def reasoner_of(kind: str, *, endless: bool = False, **latent: object) -> Reasoner:
    """Return a random reasoner; an endless one writes answers up to the limit."""
    model = tiny_model()
    settings = {"top_k": 4, "max_latents": 6, "max_answer_tokens": 7} | latent
    spec = build_spec(TOKENIZER, PromptConfig(system="1 +"), LatentConfig(**settings), len(TOKENIZER))
    if endless:
        with torch.no_grad():
            model.lm_head.weight[spec.eos_id] = 0
            model.lm_head.weight[spec.end_think_ids[0]] = 0
    thoughts, mixture = None, None
    if kind in ("sequential", "parallel"):
        torch.manual_seed(0)
        thoughts = Thoughts(SEQUENTIAL if kind == "sequential" else PARALLEL, torch.randn(16)).double().eval()
        kind = "continuous"
    mixture = {
        "spans": SpanCode(rho=0.7, longest=3),
        "mixtures": Mixtures(num_latents=3),
        "soft": Soft(temperature=1.5, top_k=3),
    }.get(kind)
    return Reasoner(
        checkpoint="random", spec=spec, thinker=Thinker(kind, model, thoughts, mixture), tokenizer=TOKENIZER
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Running:
    """A server that runs."""

    port: int
    service: Service

    @property
    def worker(self) -> Worker:
        return self.service.worker

    @functools.lru_cache  # noqa: B019  # making one takes longer than a request
    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)


@contextlib.contextmanager
def running(
    reasoner: Reasoner, *, batch_size: int = 4, most_waiting: int = 64, timeout: float = 60, key: str | None = None
) -> Iterator[Running]:
    """Serve in a thread."""
    worker = Worker(reasoner, longest=None, batch_size=batch_size, most_waiting=most_waiting)
    service = Service(reasoner=reasoner, name="tiny", worker=worker, timeout=timeout, key=key, metrics=Metrics(worker))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error", timeout_graceful_shutdown=10))
    with listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Running(listener.getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join()
    assert not worker.alive()


class Gate:
    """Lets a model run, step by step, only while it is open."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        model.register_forward_pre_hook(self._pass)

    def _pass(self, *given: object) -> None:
        self.reached.set()
        assert self.open.wait(60)
