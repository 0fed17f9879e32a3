"""Run an export in vLLM on a CPU and write what it said; `test_vllm.py` starts it in the environment of vLLM.

vllm_answers.py JOB.json  ->  {"outputs": [token ids, or null where aborted], "metrics": {name: number}} in JOB.json.out
"""

import json
import random
import sys
from pathlib import Path


def main():
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    job = json.loads(Path(sys.argv[1]).read_text())
    sizes = {"max_model_len": 128, "max_num_seqs": 8, "block_size": 32}
    llm = LLM(
        job["export"],
        enforce_eager=True,
        compilation_config={"custom_ops": ["none"]},
        dtype="float32",
        disable_log_stats=False,
        **{**sizes, **job["options"]},
    )
    asked = SamplingParams(temperature=0, max_tokens=job["max_tokens"], output_kind=RequestOutputKind.FINAL_ONLY)
    engine, rng = llm.llm_engine, random.Random(0)
    outputs, live = {}, {}
    for number, prompt in enumerate(job["prompts"]):
        live[engine.add_request(str(number), {"prompt_token_ids": prompt}, asked) or str(number)] = number
    doomed = rng.sample(range(len(job["prompts"])), job["aborts"])
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs[int(output.request_id.split("-")[0])] = list(output.outputs[0].token_ids)
        if doomed and rng.random() < 0.3:
            engine.abort_request([str(doomed.pop())])
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    found = {"outputs": [outputs.get(n) for n in range(len(job["prompts"]))], "metrics": metrics}
    Path(sys.argv[1] + ".out").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
