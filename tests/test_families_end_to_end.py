"""Every family, tied and untied, from a Hub-like folder through stage 1, labels and stage 2 to a published folder.

python tests/test_families_end_to_end.py        # writes docs/internals/families.md; a test compares each row with it
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
import transformers.dynamic_module_utils as dynamic
from conftest import NAMED
from models.families import FAMILIES, build
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from latent_sft.config.load import load_config
from latent_sft.config.schema import LoraConfig
from latent_sft.data.labels import LabelStore
from latent_sft.data.records import load_splits
from latent_sft.experiment.stores import make_labels
from latent_sft.experiment.workspace import Workspace
from latent_sft.export.checkpoint import export_checkpoint
from latent_sft.inference.generate import generate
from latent_sft.inference.solve import as_rows
from latent_sft.method.types import LatentSpec
from latent_sft.methods import STAGES
from latent_sft.methods.latent_sft import LABELS, load_stage1
from latent_sft.models.backbone import head_table, input_table
from latent_sft.models.load import add_lora, merged, save_lm
from latent_sft.models.tiny_tokenizer import build_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "internals" / "families.md"
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]
DONE = ("stage 1", "labels", "stage 2", "generate", "export", "reload")
COLUMNS = ("family", "head", "attention", "LoRA targets", *DONE)
CONFIG = load_config(
    None,
    [
        "data.synthetic.task=arithmetic",
        "data.synthetic.num_train=12",
        "data.synthetic.num_validation=4",
        "data.synthetic.num_test=4",
        *NAMED,
        "stage1.encoder.enabled=false",
        "stage1.decoder.enabled=false",
        "latent.top_k=4",
        "latent.min_latents=2",
        "latent.max_latents=5",
        "latent.max_answer_tokens=4",
    ],
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer()


def word_tokenizer() -> PreTrainedTokenizerBase:
    texts = (text for r in load_splits(CONFIG.data).train for text in (r.problem, r.cot, r.cot_answer))
    return build_tokenizer(texts, CONFIG.model.tiny, CONFIG.prompt)


def walk(family: str, tied: bool, tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, str]:
    """Take a model through everything and return its row of the table; whatever does not work raises."""
    base = folder / "base"
    save_lm(build(family, tied=tied, vocab_size=len(tokenizer), scale=3.0), base, tokenizer)
    model = dataclasses.replace(CONFIG.model, name_or_path=str(base))
    config = dataclasses.replace(CONFIG, run_dir=str(folder / "run"), model=model)
    work = Workspace(config)

    stage1 = train(work, "stage1-union")
    assert stage1.marker.grad.abs().sum() > 0
    assert all(is_tied(lm) == tied for lm in (stage1.encoder, stage1.decoder))
    make_labels(config, work)
    step = work.store_step(LABELS)
    store = LabelStore(step.directory / "store", expect=work.store_made_from(LABELS))
    row = work.data["train"][0]
    label = store.get(row["id"], row["hash"])
    assert label.ids.shape == (len(row["segment_lengths"]), 4) and torch.isfinite(label.weights).all()
    reloaded = load_stage1(work.step("stage1-union").final, config.model, config.model, work.spec)
    assert_same_weights(reloaded, stage1)

    stage2 = train(work, "stage2").lm
    prompts = [r["prompt"] for r in as_rows(work.data["validation"], 3)]
    expected = generate(stage2, work.spec, prompts, thinker="latent")
    assert all(2 <= decoded.num_steps <= 5 for decoded in expected)

    final = work.step("stage2").final
    out = export_checkpoint(final, folder / f"{family}-{'tied' if tied else 'untied'}")
    plain = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert is_tied(plain) == tied
    assert_same_weights(plain, stage2)
    prompt, decoded = prompts[0], expected[0]
    output = plain.generate(torch.tensor([prompt]), return_latents=True)
    assert output.sequences[0, len(prompt) :].tolist() == written(decoded, work.spec)
    assert output.latent_ids[0, : decoded.num_steps].tolist() == decoded.latent_ids.tolist()

    targets = lora_targets(plain)
    return {
        "family": f"`{family}`",
        "head": "tied" if tied else "untied",
        "attention": stage1.encoder_attention,
        "LoRA targets": " ".join(f"`{t}`" for t in targets),
        **dict.fromkeys(DONE, "yes"),
    }


def train(work: Workspace, name: str) -> torch.nn.Module:
    """Take a few steps on one batch, as the stage builds model and batch, and save what the stage saves."""
    stage, step = STAGES[name], work.step(name)
    torch.manual_seed(0)
    setup = work.setup(name)
    model = stage.model(setup).train()
    batch = stage.batch(setup)(list(work.data["train"].select(range(6))))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(3):
        model.zero_grad()
        out = model(**batch)
        loss = out.loss_sums["ce"] / batch["count_ce"]
        if "kl" in out.loss_sums:
            loss = loss + out.loss_sums["kl"] / batch["count_kl"]
        loss.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    step.begin(0)
    stage.save(model, setup, step.final)
    step.finish()
    return model.eval()


def lora_targets(lm: torch.nn.Module) -> list[str]:
    """Return the modules that adapters were put on, and check that they go back into plain weights."""
    before = {name for name, _ in lm.named_parameters()}
    wrapped = add_lora(lm, LoraConfig(rank=2, alpha=4))
    names = [name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")]
    assert names and not any("head" in name.split(".")[-1] or "embed" in name for name in names)
    assert {name for name, _ in merged(wrapped).named_parameters()} == before
    return sorted({name.split(".")[-1] for name in names})


def is_tied(lm: torch.nn.Module) -> bool:
    return head_table(lm) is input_table(lm)


def assert_same_weights(one: torch.nn.Module, two: torch.nn.Module) -> None:
    a, b = dict(one.named_parameters()), dict(two.named_parameters())
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def written(row: Any, spec: LatentSpec) -> list[int]:
    return [*spec.end_think_ids, *row.answer_ids, *([spec.eos_id] if row.finished else [])]


def line(row: dict[str, str]) -> str:
    return f"| {' | '.join(row[column] for column in COLUMNS)} |"


@pytest.mark.parametrize(("family", "tied"), CASES, ids=[f"{f}-{'tied' if t else 'untied'}" for f, t in CASES])
def test_family(family, tied, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    row = walk(family, tied, tokenizer, tmp_path)
    assert line(row) in PAGE.read_text().splitlines(), "run python tests/test_families_end_to_end.py"


def test_page_lists_these_families_and_no_others():
    rows = [text.split(" | ")[:2] for text in PAGE.read_text().splitlines() if text.startswith("| `")]
    assert [(name.strip("|` "), head == "tied") for name, head in rows] == CASES


PREFACE = """# Model families

Any Hugging Face causal decoder with ordinary position ids should do; nothing in the package names a family. These do,
each as a tiny random model of the family's own classes, with the output head tied to the embedding table and apart:

    python tests/test_families_end_to_end.py        # makes this page; `make test` checks every row of it

What a `yes` stands for:

- **stage 1**: encoder and decoder trained together; the loss falls, the marker gets a gradient, encoder, decoder and
  marker are saved and load again with the same weights.
- **labels**: the latents of every training row, finite and of the right shape, from the store.
- **stage 2**: trained on those labels; the loss falls.
- **generate**: latents and answer by the decoding engine.
- **export**, **reload**: the published folder loads with `AutoModelForCausalLM.from_pretrained` to the same weights,
  tied or not as before, and `generate` of `transformers` gives the same latents and tokens.

**Attention** is what `stage1.attention=auto` chose; `tests/models/test_attention.py` compares it with the dense masks.
**LoRA targets** are the modules that `model.lora.target_modules=all-linear` found: every linear map but the head.

Sliding windows (Gemma 2 and 3, Mistral, Phi-3 by their configuration) are refused in stage 1 where a sequence is longer
than the window, since the masks of stage 1 need full attention.

"""


def main() -> None:
    """Write the page."""
    torch.set_num_threads(1)
    disable_progress_bar()
    words, lines = word_tokenizer(), [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    with tempfile.TemporaryDirectory() as folder:
        dynamic.HF_MODULES_CACHE = str(Path(folder) / "modules")
        for family, tied in CASES:
            lines.append(line(walk(family, tied, words, Path(folder) / f"{family}{tied}")))
            print(lines[-1])  # noqa: T201
    PAGE.write_text(PREFACE + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
