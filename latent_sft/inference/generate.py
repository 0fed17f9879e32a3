"""Decode a list of prompts: `inference.engine` with all requests known, the longest prompt first.

The same code evaluates, serves the command line and is shipped inside exported checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from latent_sft.inference.advance import Write
from latent_sft.inference.engine import Decoded, Engine, num_given
from latent_sft.inference.noise import Sampling
from latent_sft.method.types import LatentSpec, Mixing, Superposition
from latent_sft.models.thoughts import Thoughts


def generate(
    model: nn.Module,
    spec: LatentSpec,
    prompts: Sequence[Sequence[int]],
    *,
    thinker: str,
    latents: Sequence[Superposition | Tensor] | None = None,
    thoughts: Thoughts | None = None,
    mixture: Mixing | None = None,
    max_cot_tokens: int = 512,
    sampling: Sampling | None = None,
    write: Write | None = None,
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
    static: bool = False,
    compile: bool = False,
    together: Callable[[bool], bool] | None = None,
) -> list[Decoded]:
    """Decode every prompt.

    Args:
        model: causal LM (PEFT wrapper allowed), on its device; put into eval mode for the call.
        spec: settings.
        prompts: token ids, each ending with the opening delimiter.
        thinker: `latent` (feed superpositions back), `explicit` (write the CoT out), `none` (answer at once),
            `continuous` (feed hidden states back, by `thoughts`), and by `mixture` `soft` (Soft Thinking), `spans`
            (superpositions that are code words of spans of tokens) or `mixtures` (the whole softmax).
        latents: given latents, for each prompt a superposition `[n_i, K]` or input embeddings `[n_i, D]`; thinking is
            skipped whatever the thinker, `</think>` is fed and the answer decoded (the oracle latents of stage 1).
        thoughts: for `continuous`, on the model's device; put into eval mode for the call.
        mixture: for `soft`, `spans` and `mixtures`.
        max_cot_tokens: cap of explicit and soft thinking; 0 skips it.
        sampling: None is greedy without noise.
        write: chooses answer tokens in place of that, a problem being its place in `prompts`; not for `explicit`.
        batch_size: rows decoded together; a row that ends makes room for the next problem.
        progress: called with the number of problems just finished.
        static: the same shapes at every step, at the price of attention over the whole buffer.
        compile: run steps through `torch.compile` with CUDA graphs; implies `static`. Pays on a GPU, for many problems.
        together: whether this process has problems left -> whether any of the job has. Where calls of the model are
            collectives, all processes then make equally many; give each as many prompts, and not more than are read
            at once.

    Returns:
        One `Decoded` a prompt, in order.

    Raises:
        ConfigError: the model has layers of a kind that decoding does not know.
        ValueError: an unknown thinker, one whose settings are missing, or a prompt that holds no ids of the model.
    """
    if not prompts:
        return []
    given = [None] * len(prompts) if latents is None else latents
    sizes = [len(prompt) + num_given(latent) for prompt, latent in zip(prompts, given, strict=True)]
    engine = Engine(
        model,
        spec,
        thinker=thinker if latents is None else "none",
        longest=max(sizes),
        batch_size=min(batch_size, len(prompts)),
        sampling=sampling,
        write=write,
        static=static,
        compile=compile,
        max_cot_tokens=max_cot_tokens,
        thoughts=thoughts,
        mixture=mixture,
    )
    results: dict[int, Decoded] = {}
    with engine:
        for i in sorted(range(len(prompts)), key=lambda i: -sizes[i]):
            engine.add(prompts[i], given[i], i)
        while (together or bool)(len(results) < len(prompts)):
            finished = engine.step(more=False, always=together is not None)
            if finished and progress is not None:
                progress(len(finished))
            results |= finished
    return [results[i] for i in range(len(prompts))]
