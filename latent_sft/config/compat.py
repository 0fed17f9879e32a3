"""What `compat: published` changes: the places where our defaults differ from the published Latent-SFT code.

Source: DJC-GO-SOLO/Latent-SFT at f361814, the code behind arXiv 2510.15522 v2; docs/method.md lists the differences.
"""

PUBLISHED = {
    "latent": {
        "marker_positions": "stretched",  # default position ids over text and markers
        "marker_input": "learned",
        "exclude_end": False,  # any token may be part of a latent
        "noise_scale": 1.0,  # Gumbel noise on the stage-2 labels
        "noise_temperature": 1.0,
        "noise_clip": [-1.5, 3.0],
        "projection": "input",
        "temperature": 1.0,
        "top_k": 10,
    },
    "stage1": {phase: {"normalisation": "token"} for phase in ("encoder", "decoder", "union")},
    "stage2": {"normalisation": "token", "ce_weight": 1.0, "kl_weight": 1.0},
}
