"""What a model card says of the method, and of a model that thinks in hidden states."""

from __future__ import annotations

from typing import Any

from latent_sft.method.types import LatentSpec, ThoughtSpec
from latent_sft.methods import method_of

ARGUMENTS = "`do_sample`, `temperature`, `top_p`, `max_new_tokens`\n"


def method(thoughts: ThoughtSpec, name: str, origin: str) -> str:
    """Return what the model is and how it thinks; `origin` is ` from BASE` or empty."""
    count = thoughts.num_latents
    if thoughts.iterations == 0:
        how = f"reads {count} pause tokens, one trained embedding fed {count} times, in the pass that reads the prompt."
    else:
        through = " through a small network" if thoughts.projection else ""
        how = f"thinks in {count} latents: hidden states of its last layer, fed back{through} as input embeddings, "
        times = "once" if thoughts.iterations == 1 else f"{thoughts.iterations} times"
        how += "one after another." if thoughts.sequential else f"all at once, {times} over (Jacobi iterations)."
    weights = (
        "`thoughts.safetensors` holds the weights of that; `custom_generate/generate.py` reads it beside the model."
    )
    return f"A reasoner {trained_with(name)}{origin}.\nBefore it answers it {how}\n{weights}"


def settings(thoughts: ThoughtSpec) -> list[tuple[str, Any]]:
    """Return rows of the table of settings."""
    passes = f"{thoughts.num_latents}, one after another" if thoughts.sequential else thoughts.iterations
    return [
        ("latents", thoughts.num_latents),
        ("passes over the latents", passes),
        ("hidden states pass a projection", "yes" if thoughts.projection else "no"),
    ]


def limitations(spec: LatentSpec, thoughts: ThoughtSpec) -> str:
    """Return a list of them."""
    return (
        "- The latents are hidden states. The tokens that are shown for them are what the LM head makes of these: a "
        "view, no written argument, and not what is fed back.\n"
        "- Trained on problems like those named above; nothing is claimed about others.\n"
        f"- It always thinks in {thoughts.num_latents} latents; answers end after {spec.max_answer_tokens} tokens.\n"
        "- Beam search, assisted generation and other servers than `transformers` are not supported by the enclosed "
        "code."
    )


def trained_with(name: str) -> str:
    """Return which method a model was trained with, as part of a sentence."""
    if not name:
        return "trained"
    known = method_of(name)
    return f"trained with {known.title} ([arXiv {known.arxiv}](https://arxiv.org/abs/{known.arxiv}))"


def citation(name: str) -> str:
    """Return the paper of a method, as BibTeX."""
    if not name:
        return "The method is not recorded with this checkpoint."
    known = method_of(name)
    fields = {"title": known.paper, "eprint": known.arxiv, "archivePrefix": "arXiv"}
    lines = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"The method:\n\n```bibtex\n@misc{{arxiv{known.arxiv},\n{lines}\n}}\n```"
