"""What the server answers is what the engine decodes: all thinkers, whole or streamed, sampled, cut, in company."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serve.running import KINDS, PROBLEMS, TOKENIZER, Running, reasoner_of, running

from latent_sft.data.prompts import render_prompt
from latent_sft.inference.generate import Sampling, generate
from latent_sft.serve import worker


def messages(problem: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": problem}]


def ask(server: Running, problem: str, **settings: object):
    extra = {"latent_sft": settings.pop("latent_sft")} if "latent_sft" in settings else {}
    if "top_k" in settings:
        extra["top_k"] = settings.pop("top_k")
    return server.client().chat.completions.create(
        model="tiny", messages=messages(problem), extra_body=extra, **settings
    )


def streamed(server: Running, problem: str, **settings: object) -> dict[str, object]:
    """Return the pieces of a stream put together, with their number."""
    found = {"text": "", "reasoning": "", "latents": [], "tokens": [], "pieces": 0, "finish": None, "usage": None}
    for chunk in ask(server, problem, stream=True, stream_options={"include_usage": True}, **settings):
        found["usage"] = chunk.usage or found["usage"]
        for choice in chunk.choices:
            found["pieces"] += bool(choice.delta.content)
            found["text"] += choice.delta.content or ""
            found["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            found["latents"] += getattr(choice, "latent_sft", {"latents": []})["latents"]
            found["tokens"] += [entry.token for entry in choice.logprobs.content] if choice.logprobs else []
            found["finish"] = choice.finish_reason or found["finish"]
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(reasoner_of("latent")) as server:
        yield server


@pytest.fixture(scope="module")
def writer() -> Iterator[Running]:
    """Return a server whose thoughts always have 30 tokens, and answers 40."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "MAX_COT_TOKENS", 30)
        with running(reasoner_of("explicit", endless=True, max_answer_tokens=40)) as server:
            yield server


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_think_answers_as_the_command_line_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "MAX_COT_TOKENS", 20)
    reasoner = reasoner_of(kind)
    expected = reasoner.generate(list(PROBLEMS), top=3, max_cot_tokens=20)
    assert len({solution.answer for solution in expected}) > 2
    extras = {"latents": True, "top": 3}
    with running(reasoner) as server, ThreadPoolExecutor(4) as pool:
        whole = list(pool.map(lambda problem: ask(server, problem, latent_sft=extras), PROBLEMS))
        parts = list(pool.map(lambda problem: streamed(server, problem, latent_sft=extras), PROBLEMS))
    for solution, response, stream in zip(expected, whole, parts, strict=True):
        (choice,) = response.choices
        thought = solution.thought or "\n".join(" ".join(text for text, _ in one.tokens) for one in solution.latents)
        assert (choice.message.content, stream["text"]) == (solution.answer, solution.answer)
        assert (getattr(choice.message, "reasoning_content", ""), stream["reasoning"]) == (thought, thought)
        for latents in (choice.latent_sft["latents"], stream["latents"]):
            for one, shown in zip(latents, solution.latents, strict=True):
                assert (one["ids"], one["span"]) == (shown.ids, shown.span)
                assert [text for text, _ in one["tokens"]] == [text for text, _ in shown.tokens]
                assert [w for _, w in one["tokens"]] == pytest.approx([w for _, w in shown.tokens], abs=0.02)
                assert one["entropy"] == pytest.approx(shown.entropy, abs=0.05)
        assert response.usage.completion_tokens_details.reasoning_tokens == solution.num_steps
        assert response.usage == stream["usage"]
        assert choice.finish_reason == stream["finish"]
        assert solution.finished <= (choice.finish_reason == "stop")


def test_samples_are_those_of_their_seed_whoever_else_is_served(server: Running) -> None:
    reasoner, settings = server.service.reasoner, {"temperature": 1.5, "top_p": 0.9, "top_k": 6}
    prompt = render_prompt(TOKENIZER, reasoner.spec, PROBLEMS[3])
    sampling = Sampling(seed=11, **settings)
    rows = generate(reasoner.thinker.lm, reasoner.spec, [prompt] * 4, thinker="latent", sampling=sampling)
    expected = [TOKENIZER.decode(row.answer_ids) for row in rows]
    assert len(set(expected)) > 1

    def company(i: int) -> None:
        ask(server, PROBLEMS[i % len(PROBLEMS)], temperature=[0, 0.7, 2.0][i % 3], n=1 + i % 2, seed=i)

    with ThreadPoolExecutor(6) as pool:
        others = [pool.submit(company, i) for i in range(24)]
        found = [
            [choice.message.content for choice in ask(server, PROBLEMS[3], n=4, seed=11, **settings).choices]
            for _ in range(3)
        ]
        assert not [other.exception() for other in others if other.exception()]
    assert found == [expected] * 3
    other = ask(server, PROBLEMS[3], n=4, seed=12, **settings)
    assert [choice.message.content for choice in other.choices] != expected


def test_completions_take_prompts_as_they_are(server: Running) -> None:
    reasoner = server.service.reasoner
    prompts = [render_prompt(TOKENIZER, reasoner.spec, problem) for problem in PROBLEMS[:3]]
    expected = [solution.answer for solution in reasoner.generate(list(PROBLEMS[:3]))]
    create, texts = server.client().completions.create, [f"1 +\n{problem}\n" for problem in PROBLEMS[:3]]
    for given in (prompts, texts):  # the opening delimiter is added where it is missing
        response = create(model="tiny", prompt=given, n=2)
        assert [choice.text for choice in response.choices] == [answer for answer in expected for _ in range(2)]
        assert [choice.index for choice in response.choices] == list(range(6))
    assert create(model="tiny", prompt=texts[1]).choices[0].text == expected[1]
    stream = create(model="tiny", prompt=prompts[1], stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected[1]


def test_an_answer_ends_at_a_stop_string_even_inside_of_tokens(writer: Running) -> None:
    whole = ask(writer, "2 + 3").choices[0].message.content
    assert len(whole.split()) == 40
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]  # of several tokens, and of parts of them
    expected = whole[: whole.index(stop)].strip()
    for settings in ({"stop": stop}, {"stop": ["never", stop]}):
        response, stream = ask(writer, "2 + 3", **settings), streamed(writer, "2 + 3", logprobs=True, **settings)
        assert response.choices[0].message.content == stream["text"] == expected
        assert response.choices[0].finish_reason == stream["finish"] == "stop"
        assert response.usage == stream["usage"]
        # written: as many tokens as it takes for the string to be there
        count = len(stream["tokens"])
        assert stop in " ".join(stream["tokens"]) and stop not in " ".join(stream["tokens"][:-1])
        assert count == response.usage.completion_tokens - response.usage.completion_tokens_details.reasoning_tokens


def test_an_answer_comes_as_it_is_written(writer: Running) -> None:
    assert streamed(writer, "2 + 3")["pieces"] > 5


def test_limits_of_a_request(server: Running, writer: Running) -> None:
    whole = ask(writer, "2 + 3")
    steps = whole.usage.completion_tokens_details.reasoning_tokens
    assert steps == 30
    response = ask(writer, "2 + 3", max_tokens=3)  # of the answer
    assert response.choices[0].message.content == " ".join(whole.choices[0].message.content.split()[:3])
    assert response.choices[0].finish_reason == "length" and response.usage.completion_tokens == steps + 3
    response = ask(writer, "2 + 3", max_completion_tokens=steps + 2)
    assert response.choices[0].message.content == " ".join(whole.choices[0].message.content.split()[:2])
    response = ask(writer, "2 + 3", max_completion_tokens=7)  # ends while it thinks
    assert (response.choices[0].message.content, response.choices[0].finish_reason) == ("", "length")
    assert response.usage.completion_tokens == 7
    assert whole.choices[0].message.reasoning_content.startswith(response.choices[0].message.reasoning_content)
    for limits in ({"max_latents": 2}, {"min_latents": 5}, {"min_latents": 4, "max_latents": 4}, {"max_latents": 0}):
        for problem in PROBLEMS[:4]:
            expected = server.service.reasoner.generate(problem, **limits)
            found = ask(server, problem, latent_sft={"latents": True, **limits})
            assert found.choices[0].message.content == expected.answer
            assert found.choices[0].latent_sft["num_steps"] == expected.num_steps


def test_log_probabilities_are_those_of_the_model() -> None:
    reasoner = reasoner_of("none", endless=True, min_latents=2)
    spec, prompt = reasoner.spec, render_prompt(TOKENIZER, reasoner.spec, "2 + 3")
    with running(reasoner) as server:
        response = ask(server, "2 + 3", logprobs=True, top_logprobs=3)
        raw = server.client().completions.create(model="tiny", prompt=prompt, logprobs=2).choices[0]
        plain = ask(server, "2 + 3")
    entries = response.choices[0].logprobs.content
    answer = TOKENIZER.convert_tokens_to_ids([entry.token for entry in entries])
    assert TOKENIZER.decode(answer) == response.choices[0].message.content and len(answer) > 1
    with torch.no_grad():
        ids = torch.tensor([[*prompt, *spec.end_think_ids, *answer]])
        logs = reasoner.thinker.lm(ids).logits[0].log_softmax(-1)[-len(answer) - 1 : -1]
    for entry, token, row in zip(entries, answer, logs, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)
        assert bytes(entry.bytes).decode() == entry.token
    assert raw.logprobs.token_logprobs == pytest.approx([entry.logprob for entry in entries], abs=1e-5)
    assert [len(top) for top in raw.logprobs.top_logprobs] == [2] * len(answer)
    offsets = raw.logprobs.text_offset
    assert offsets == [len(TOKENIZER.decode(answer[:i])) for i in range(len(answer))]
    assert plain.choices[0].logprobs is None
