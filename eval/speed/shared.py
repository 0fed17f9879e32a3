"""Memory of stage 1 with `stage1.share_backbone` against without: `python -m eval.speed.shared`.

Each case is a process of its own that builds a Llama of 71 million parameters with adapters as the union phase does and
goes forward and backward once. Shown are the bytes of the weights and the resident memory at the peak, from before the
model was built (Linux).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from latent_sft.config.load import load_config
from latent_sft.methods import STAGES
from latent_sft.methods.latent_sft import stage1_batch
from latent_sft.workspace import Workspace

SETTINGS = [
    "data.synthetic.num_train=20",
    "data.synthetic.num_validation=4",
    "data.synthetic.num_test=4",
    "model.tiny.hidden_size=768",
    "model.tiny.num_layers=10",
    "model.tiny.num_heads=12",
    "model.tiny.num_kv_heads=12",
    "model.tiny.intermediate_size=2048",
    "model.lora.rank=16",
    "stage1.encoder.enabled=false",
    "stage1.decoder.enabled=false",
]


def measure(*, share: bool) -> dict[str, float]:
    """Return MiB of the weights, and of what the model and one training step add to this process at the peak."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(None, [*SETTINGS, f"run_dir={folder}", f"stage1.share_backbone={str(share).lower()}"])
        work = Workspace(config)
        rows = work.data["train"].select(range(2)).to_list()
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        model = STAGES["stage1-union"].model(work.setup("stage1-union"))
        model(**stage1_batch(rows, work.spec, normalisation="token"))["ce_total"].backward()
        weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    peak = resident("VmHWM") - before
    return {"weights_mib": round(sum(weights.values()) / 2**20), "peak_rss_mib": round(peak)}


def resident(field: str) -> float:
    """Return a line of this process's status in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 2**10 for line in lines if line.startswith(field))


def main() -> None:
    """Show one line a case."""
    for share in ("false", "true"):
        done = subprocess.run(
            [sys.executable, "-m", "eval.speed.shared", share], capture_output=True, text=True, check=True
        )
        sys.stdout.write(f"stage1.share_backbone={share}: {done.stdout.splitlines()[-1]}\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.stdout.write(json.dumps(measure(share=sys.argv[1] == "true")))
    else:
        main()
