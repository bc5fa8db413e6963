"""A step of Llama-3-70B without data, against the same step on torch's meta device.

    python benchmarks/none.py [layers]

Forward and backward of one sequence of 4096 tokens in bfloat16, on one thread and one trn device
with pretend HBM. Each device has a process of its own; the figures are those of its fastest step
(after one that is counted apart: it prices every operator), and the process's largest resident
memory.
Attention is named anew because transformers' own names make it read its position ids, which a meta
tensor cannot give; both devices run the same step.
"""

import json
import os
import resource
import subprocess
import sys
import time

LAYERS = 80
STEPS = 4
RATIO_LIMIT = 1.5
MEMORY_LIMIT_GIB = 1.5


def measure(device: str, layers: int) -> dict[str, float]:
    """Seconds of a first and of the fastest further step, and what the process came to."""
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.set_num_threads(1)
    AttentionInterface.register("causal", sdpa_attention_forward)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=8192,
        num_attention_heads=64,
        num_key_value_heads=8,
        intermediate_size=28672,
        vocab_size=128256,
        max_position_embeddings=8192,
        use_cache=False,
        attn_implementation="causal",
    )
    start = time.perf_counter()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        ids = torch.randint(0, 128256, (1, 4096))
    result = {"made_s": time.perf_counter() - start}
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        times.append(time.perf_counter() - start)
        model.zero_grad()
    result |= {"first_s": times[0], "step_s": min(times[1:])}
    result["resident_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if device == "trn":
        torch.trn.synchronize()
        before = torch.trn.Event(enable_timing=True)
        after = torch.trn.Event(enable_timing=True)
        before.record()
        model(input_ids=ids, labels=ids).loss.backward()
        after.record()
        torch.trn.synchronize()
        result["hbm_gib"] = torch.trn.max_memory_allocated() / 2**30
        result["simulated_s"] = before.elapsed_time(after) / 1e3
    return result


def in_process(device: str, layers: int) -> dict[str, float]:
    """`measure` in a process of its own."""
    environment = os.environ | {"TRN_NUMERICS": "none", "TRN_HBM_BYTES": "4TiB"}
    command = [sys.executable, __file__, str(layers), device]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Prints both devices and how they compare."""
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else LAYERS
    if len(sys.argv) > 2:
        print(json.dumps(measure(sys.argv[2], layers)))
        return
    trn, meta = in_process("trn", layers), in_process("meta", layers)
    print(f"Llama-3-70B, {layers} of {LAYERS} layers, 1 x 4096, bf16, forward and backward")
    for name, result in (("trn, no data", trn), ("meta", meta)):
        print(
            f"  {name:12}  model {result['made_s']:6.2f} s   first step {result['first_s']:6.2f} s"
            f"   step {result['step_s']:6.3f} s   resident {result['resident_gib']:.2f} GiB"
        )
    ratio = trn["step_s"] / meta["step_s"]
    first = (trn["made_s"] + trn["first_s"]) / (meta["made_s"] + meta["first_s"])
    fits = ratio <= RATIO_LIMIT and trn["resident_gib"] <= MEMORY_LIMIT_GIB
    print(
        f"  trn / meta: step {ratio:.2f} (at most {RATIO_LIMIT}), model and first step "
        f"{first:.2f}, resident at most {MEMORY_LIMIT_GIB} GiB: {'ok' if fits else 'ABOVE'}"
    )
    print(
        f"  simulated: {trn['simulated_s']:.3f} s a step on one NeuronCore, "
        f"peak HBM {trn['hbm_gib']:.1f} GiB"
    )


if __name__ == "__main__":
    main()
