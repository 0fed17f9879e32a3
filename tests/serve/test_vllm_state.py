"""What vLLM is given to keep beside its requests, driven by a stand-in for its model runner, against the engine.

The runner reads prompts in pieces, in any slots and any mix, drops requests and comes back to them; what it has read of
a request is the list of embeddings that it was given at the time.
"""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace

import pytest
import torch
from inference.test_generate import END, EOS, SPEC, model_of
from inference.test_thoughts import PARALLEL, SEQUENTIAL, thoughts_of

from latent_sft.errors import ConfigError
from latent_sft.inference.generate import generate
from latent_sft.method.types import Mixtures, Soft, SpanCode, Superposition
from latent_sft.models.backbone import mix_latents
from latent_sft.models.load import save_thinker
from latent_sft.models.logits import head
from latent_sft.models.thoughts import save_thoughts
from latent_sft.serve.vllm.plugin import LatentModel
from latent_sft.serve.vllm.state import LatentState

THINK = (5, 2)
LIMITS = dataclasses.replace(SPEC, think_ids=THINK, max_latents=7, max_answer_tokens=6, decode_temperature=2.0)
SOFT = {"temperature": 1.5, "top_k": 5}
WAYS = {
    "latent": None,
    "continuous": SEQUENTIAL,
    "soft": Soft(**SOFT),
    "spans": SpanCode(rho=0.7, longest=3),
    "unsnapped": SpanCode(rho=0.7, longest=3, snap="none"),
    "mixtures": Mixtures(num_latents=5),
}
SLOTS = 3


class Plain:
    """A language model as vLLM's classes are: embeddings, states and logits apart."""

    def __init__(self, lm):
        self.lm, self.embed_input_ids = lm, lm.get_input_embeddings()

    def compute_logits(self, hidden):
        return head(self.lm)(hidden)

    def load_weights(self, weights):
        return {name for name, _ in weights}


class Model(LatentModel, Plain):
    pass


class Base:
    def __init__(self, *given):
        self.calls = []

    def add_request(self, slot, new):
        self.calls.append(new.req_id)

    def remove_request(self, name):
        self.calls.append(name)

    def prepare_inputs(self, batch, requests):
        return {"input_ids": batch.input_ids, "own": 1}

    def prepare_dummy_inputs(self, requests, tokens):
        return {"own": 1}


class State(LatentState, Base):
    pass


@dataclasses.dataclass
class Request:
    prompt: list[int]
    limit: int
    stop: bool = False
    output: list[int] = dataclasses.field(default_factory=list)
    read: list[torch.Tensor] = dataclasses.field(default_factory=list)
    prefill: int = 0
    slot: int = -1

    @property
    def tokens(self):
        return self.prompt + self.output


class Runner:
    """Greedy, with every choice of vLLM's scheduler left to chance."""

    def __init__(self, config, lm, seed):
        self.model, self.rng = Model(lm), random.Random(seed)
        self.state = State(config, self.model, None, torch.device("cpu"))
        lengths = {
            name: SimpleNamespace(gpu=torch.zeros(SLOTS, dtype=torch.int32)) for name in ("prompt_len", "prefill_len")
        }
        self.requests = SimpleNamespace(**lengths)
        self.sampler, _ = self.state.custom_sampler(SimpleSampler(self.requests))
        self.live, self.slots, self.preemptions = {}, list(range(SLOTS)), 0

    def enter(self, name, request):
        request.slot, request.read, request.prefill = self.slots.pop(), [], len(request.tokens)
        self.live[name] = request
        self.requests.prompt_len.gpu[request.slot] = len(request.prompt)
        self.requests.prefill_len.gpu[request.slot] = request.prefill
        asked = SimpleNamespace(stop=["x"] if request.stop else [], stop_token_ids=None)
        new = {"prompt_token_ids": request.prompt, "prompt_len": len(request.prompt), "sampling_params": asked}
        self.state.add_request(request.slot, SimpleNamespace(req_id=name, prefill_token_ids=request.tokens, **new))

    def leave(self, name):
        self.state.remove_request(name)
        self.slots.append(self.live[name].slot)
        return self.live.pop(name)

    def run(self, waiting, cancels=0.0, preempts=0.1):
        """Return the requests that came to their end, of those `{name: request}`."""
        waiting, done = dict(waiting), {}
        while waiting or self.live:
            while waiting and self.slots and self.rng.random() < 0.7:
                name = next(iter(waiting))
                self.enter(name, waiting.pop(name))
            if not self.live:
                continue
            self.step(self.rng.sample(sorted(self.live), self.rng.randint(1, len(self.live))))
            for name in sorted(self.live):
                request = self.live[name]
                if request.output[-1:] == [EOS] or len(request.output) == request.limit:
                    done[name] = self.leave(name)
                elif self.rng.random() < cancels:
                    self.leave(name)
                elif self.rng.random() < preempts:
                    self.preemptions += 1
                    waiting = {name: self.leave(name), **waiting}  # it is the next to be let in
        return done

    def step(self, names):
        chosen = [self.live[name] for name in names]
        counts = [self.rng.randint(1, len(r.tokens) - len(r.read)) for r in chosen]
        pieces = [range(len(r.read), len(r.read) + n) for r, n in zip(chosen, counts, strict=True)]
        starts = torch.tensor([0, *counts]).cumsum(0)
        batch = SimpleNamespace(
            num_tokens=sum(counts),
            num_tokens_after_padding=sum(counts) + 2,
            num_reqs=len(chosen),
            idx_mapping=torch.tensor([r.slot for r in chosen]),
            query_start_loc=torch.cat([starts, starts[-1:]]),
            positions=torch.tensor([i for piece in pieces for i in piece] + [0, 0]),
            input_ids=torch.tensor(
                [r.tokens[i] for r, piece in zip(chosen, pieces, strict=True) for i in piece] + [0, 0]
            ),
            logits_indices=starts[1:] - 1,
            seq_lens=torch.tensor([piece.stop for piece in pieces] + [0]),
        )
        inputs = self.state.prepare_inputs(batch, self.requests)
        assert inputs["input_ids"] is None and inputs["own"] == 1 and not inputs["inputs_embeds"][-2:].any()
        hidden = []
        for request, fed in zip(chosen, inputs["inputs_embeds"].clone().split([*counts, 2]), strict=False):
            request.read += fed
            hidden.append(
                self.model.lm.get_decoder()(inputs_embeds=torch.stack(request.read)[None]).last_hidden_state[0, -1]
            )
        output = self.sampler(self.model.compute_logits(torch.stack(hidden)), batch)
        for request, token in zip(chosen, output.sampled_token_ids[:, 0].tolist(), strict=True):
            if len(request.read) == len(request.tokens):
                request.output.append(token)


class SimpleSampler:
    def __init__(self, requests):
        self.req_states, self.logprobs = requests, None

    def __call__(self, logits, batch):
        tokens = logits.argmax(-1, keepdim=True)
        logits.fill_(float("nan"))  # as vLLM's may
        scores = torch.full((len(tokens), 2), -1.0)
        self.logprobs = (tokens.repeat(1, 2), scores, torch.full((len(tokens),), 5))
        return SimpleNamespace(sampled_token_ids=tokens, logprobs_tensors=self.logprobs)


def config_of(folder, lm, **additional):
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            dtype=torch.float32,
            get_inputs_embeds_size=lambda: lm.get_input_embeddings().weight.shape[1],
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=SLOTS, max_num_batched_tokens=200),
        additional_config=additional,
    )


def saved(folder, way, lm):
    """Return vLLM's configuration of a checkpoint of a way of thinking, and what the engine needs of it."""
    how = WAYS[way]
    if isinstance(how, Soft):
        save_thinker(folder, LIMITS, "explicit")
        return config_of(folder, lm, soft=SOFT, max_cot_tokens=6), {
            "thinker": "soft",
            "mixture": how,
            "max_cot_tokens": 6,
        }
    save_thinker(folder, LIMITS, "latent" if how is None else how.thinker, how)
    if how is SEQUENTIAL:
        thoughts = thoughts_of(lm, how)
        save_thoughts(thoughts, folder)
        return config_of(folder, lm), {"thinker": way, "thoughts": thoughts}
    return config_of(folder, lm), {"thinker": "latent"} if how is None else {"thinker": how.thinker, "mixture": how}


@torch.inference_mode()
@pytest.mark.parametrize("way", WAYS)
def test_chunks_preemptions_and_cancellations_equal_the_engine(way, tmp_path):
    lm, rng = model_of("gemma" if way in ("latent", "mixtures") else "llama"), random.Random(1)
    lm.eval()
    config, options = saved(tmp_path, way, lm)
    bare = [[rng.randrange(6, 40) for _ in range(rng.randint(1, 12))] for _ in range(24)]
    rows = generate(lm, LIMITS, [[*p, *THINK] for p in bare], **options)
    given = [THINK[: i % 3] for i in range(24)]  # what the prompt has of <think>
    runner = Runner(config, lm, seed=2)
    requests = {
        f"r{i:02}": Request([*p, *t], 17, stop=i > 20) for i, (p, t) in enumerate(zip(bare, given, strict=True))
    }
    done = runner.run(requests, cancels=0.005)
    assert runner.preemptions > 10 and 12 < len(done) < 24
    for name, request in done.items():
        number = int(name[1:])
        row, mute = rows[number], number > 20
        opened = list(THINK[len(given[number]) :])
        said = row.latent_ids[:, 0].tolist()
        mixed = (row.latent_weights[:, 0] < 1).tolist()
        # EOS and </think> mean something outside
        words = [THINK[-1] if mute or w == EOS or (m and w == END) else w for w, m in zip(said, mixed, strict=True)]
        if way == "soft" and row.thought_ids[-1:] == [EOS]:
            words[-1] = EOS
            closed = []
        else:
            closed = list(LIMITS.end_think_ids)
        start = opened + words + closed
        assert request.output[: len(start)] == start, (name, request.output, start)
        answer = request.output[len(start) :][: LIMITS.max_answer_tokens]  # the client says how long an answer may be
        assert answer == [*row.answer_ids, *[EOS] * (row.finished and bool(closed))]


@torch.inference_mode()
def test_embeddings_are_those_of_the_engine_and_forced_tokens_are_certain(tmp_path):
    lm = model_of("gemma").eval()  # scales embeddings
    config, options = saved(tmp_path, "latent", lm)
    spec = dataclasses.replace(LIMITS, min_latents=7)
    save_thinker(tmp_path, spec, "latent")
    (row,) = generate(lm, spec, [[9, 8, *THINK]], **options)
    runner = Runner(config, lm, seed=0)
    runner.enter("a", Request([9, 8, *THINK], 30))
    request = runner.live["a"]
    while len(request.output) < 10:
        before = len(request.output)
        runner.step(["a"])
        ids, values, ranks = runner.sampler.logprobs
        thinks = before < 9
        assert len(request.output) == before or (ids[0, 0] == request.output[-1] and (values[0, 0] == 0) == thinks)
        assert (ranks[0] == 1) == thinks and values[0, 1] == -1
    expected = mix_latents(lm, Superposition(row.latent_ids, row.latent_weights))
    assert len(expected) == 7
    torch.testing.assert_close(torch.stack(request.read[4:11]), expected, rtol=1e-4, atol=1e-4)
    assert runner.state.prepare_dummy_inputs(1, 5)["inputs_embeds"].data_ptr() == runner.state.fed.data_ptr()


def test_rows_are_taken_from_requests_that_left_longest_ago(tmp_path):
    lm = model_of("llama")
    config, _ = saved(tmp_path, "latent", lm)
    runner = Runner(config, lm, seed=0)
    for number in range(50):
        runner.enter(f"{number}", Request([7, *THINK], 9))
        if number > 1:
            runner.leave(f"{number - 1}")
    held = runner.state.held
    assert (
        len(held) == 2 * SLOTS == len(set(held.values()))
        and set(runner.live) == {"0", "49"} == set(held) & runner.live.keys()
    )
    assert runner.model.load_weights([("lm.weight", 0), ("placeholder", 0), ("projection.1.bias", 0)]) == {"lm.weight"}


def test_a_model_that_thinks_at_once_writes_or_draws_noise_is_refused(tmp_path):
    lm = model_of("llama")
    save_thinker(tmp_path, LIMITS, "continuous", PARALLEL)
    save_thoughts(thoughts_of(lm, PARALLEL), tmp_path)
    with pytest.raises(ConfigError, match=r"thinks its 4 latents at once.*own engine"):
        State(config_of(tmp_path, lm), Model(lm), None, torch.device("cpu"))
    save_thinker(tmp_path, LIMITS, "explicit")
    with pytest.raises(ConfigError, match=r"does not think in latents \('explicit'\)"):
        State(config_of(tmp_path, lm), Model(lm), None, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"soft.noise_scale: got 0.5, expected 0"):
        State(config_of(tmp_path, lm, soft={"noise_scale": 0.5}), Model(lm), None, torch.device("cpu"))
