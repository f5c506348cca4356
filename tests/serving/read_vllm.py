"""Run by vLLM's own Python: ``read_vllm.py JOB ANSWER`` computes the log-probabilities that a job asks for.

JOB is a JSON file: ``base``, ``prompts`` (numbers of tokens), ``adapters`` (folders by name), ``max_rank``,
``vocabulary``. ANSWER becomes a JSON file with a row of log-probabilities per prompt by adapter and, as ``base``, of
the base model; the message of an adapter that is refused in its place.
"""

import json
import os
import sys

os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # In this process, so that the message of a refused adapter arrives here.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

# Not lm_head: vLLM has no log-probabilities of prompts with it.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    with open(sys.argv[1]) as file:
        job = json.load(file)
    llm = LLM(
        model=job["base"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        enable_lora=True,
        max_lora_rank=job["max_rank"],
        lora_target_modules=TARGETS,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_logprobs=job["vocabulary"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
    )
    settings = SamplingParams(max_tokens=1, temperature=0.0, logprobs=job["vocabulary"], detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    answer = {}
    for number, (name, folder) in enumerate({"base": None, **job["adapters"]}.items()):
        request = LoRARequest(name, number, folder) if folder else None
        try:
            outputs = llm.generate(prompts, settings, lora_request=request, use_tqdm=False)
        except ValueError as error:
            answer[name] = str(error)
            continue
        rows = [output.outputs[0].logprobs[0] for output in outputs]
        answer[name] = [[row[token].logprob for token in range(job["vocabulary"])] for row in rows]
    with open(sys.argv[2], "w") as file:
        json.dump(answer, file)


if __name__ == "__main__":
    main()
