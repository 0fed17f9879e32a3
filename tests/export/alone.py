"""Run an exported folder with `transformers` and nothing of the package; `test_custom_generate.py` starts it.

alone.py FOLDER REQUEST.json  ->  results as JSON on the last line of stdout
"""

import contextlib
import io
import json
import sys
from pathlib import Path


class Forbidden:
    """Import hook that makes the package unavailable, also where it is installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "latent_sft":
            raise ImportError(f"{name} must not be imported")


sys.meta_path.insert(0, Forbidden())

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: E402

folder, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
torch.set_num_threads(1)


def padded(prompts, side):
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side, trust_remote_code=True)
    return tokenizer.pad({"input_ids": prompts}, return_tensors="pt")


def latents(output):
    rows = zip(output.latent_ids, output.latent_weights, output.num_latents.tolist(), strict=True)
    return [{"ids": ids[:n].tolist(), "weights": weights[:n].tolist()} for ids, weights, n in rows]


results = {}
plain = LlamaForCausalLM.from_pretrained(folder)
trusting = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
for side in ("left", "right"):
    inputs = padded(request["prompts"], side)
    output = plain.generate(**inputs, custom_generate=folder, trust_remote_code=True, return_latents=True)
    ids, sequences = inputs["input_ids"].tolist(), output.sequences.tolist()
    embeds = None if output.latent_embeds is None else output.latent_embeds.tolist()
    results[side] = {"inputs": ids, "sequences": sequences, "latents": latents(output), "embeds": embeds}
    results[f"{side}, loaded with trust"] = trusting.generate(**inputs).tolist()
one = torch.tensor([request["prompts"][0]])
results["positional"] = trusting.generate(one).tolist()
results["closed"] = trusting.generate(one[:, : -request["delimiter"]]).tolist()
limits = {} if request["continuous"] else {"min_latents": 3, "max_latents": 3}
results["limits"] = trusting.generate(one, **limits, max_new_tokens=1).tolist()
results["both ways"] = trusting.generate(one, custom_generate=folder, trust_remote_code=True).tolist()


def noisy(seed):
    torch.manual_seed(seed)
    return latents(trusting.generate(one, min_latents=4, noise_scale=1.0, return_latents=True))


results["noise"] = None if request["continuous"] else [noisy(0), noisy(0), noisy(1)]


def sampled(seed):
    torch.manual_seed(seed)
    return trusting.generate(one, do_sample=True, temperature=3.0, top_p=0.9).tolist()


results["sampled"] = [sampled(seed) for seed in (0, 0, 1, 2, 3)]
errors = {}
for name, change in request["refused"].items():
    try:
        trusting.generate(**{"input_ids": one, **change})
    except Exception as error:
        errors[name] = f"{type(error).__name__}: {error}"
results["errors"] = errors
try:
    plain.generate(one, custom_generate=folder, trust_remote_code=False)
except Exception as error:
    results["untrusted"] = type(error).__name__
try:
    AutoModelForCausalLM.from_pretrained(folder)
except Exception as error:
    results["loaded without trust"] = str(error)
copy = Path("../saved by transformers").absolute()
trusting.save_pretrained(copy)
AutoTokenizer.from_pretrained(folder).save_pretrained(copy)
saved = AutoModelForCausalLM.from_pretrained(copy, trust_remote_code=True)
again = Path("../saved again").absolute()
saved.save_pretrained(again)
results["saved"] = [
    AutoModelForCausalLM.from_pretrained(p, trust_remote_code=True).generate(one).tolist() for p in (copy, again)
]
results["saved files"] = [
    sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file() and "pycache" not in str(p))
    for f in (Path(folder), copy)
]
printed = []
scope = {}
for code in request["card"]:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, scope)
    printed.append(out.getvalue())
results["card"] = printed
sys.stdout.write("\n" + json.dumps(results) + "\n")  # where a terminal would be, transformers asks a question
