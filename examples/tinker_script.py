"""A Tinker script: a loop of your own over sample, forward_backward and optim_step, with the official SDK.

    python examples/tinker_script.py                              # one process, a tiny random model
    torchrun --nproc_per_node=8 examples/tinker_script.py Qwen/Qwen3-0.6B

The service runs inside this program. For a server on another machine set TINKER_BASE_URL and TINKER_API_KEY and write
`with tinker.ServiceClient() as client:` (import tinker); the rest stays. Needs pip install 'skyrl-spmd[tinker]'.
"""

import sys

from tinker import types

import skyrl.tinker


def reward(text: str) -> float:
    """The part of the text's characters that are digits."""
    return sum(one.isdigit() for one in text) / max(len(text), 1)


def main(base: str = "tiny", steps: int = 20, groups: int = 4, samples: int = 8) -> list[float]:
    """REINFORCE with a baseline of the group; returns the mean reward of each step."""
    curve = []
    with skyrl.tinker.service_client(model={"path": base}) as client:
        model = client.create_lora_training_client(base_model=base, rank=8, seed=1).result()
        tokenizer = model.get_tokenizer()
        prompt = tokenizer.encode("7+5=")
        for step in range(steps):
            sampler = model.save_weights_and_get_sampling_client().result()
            wanted = types.SamplingParams(max_tokens=8, temperature=1.0)
            drawn = [
                sampler.sample(types.ModelInput.from_ints(prompt), samples, wanted.model_copy(update={"seed": seed}))
                for seed in range(step * groups, (step + 1) * groups)
            ]
            data, rewards = [], []
            for group in drawn:
                sequences = group.result().sequences
                scores = [reward(tokenizer.decode(one.tokens)) for one in sequences]
                rewards += scores
                for one, score in zip(sequences, scores, strict=True):
                    advantage = score - sum(scores) / len(scores)
                    tokens, before = prompt + one.tokens, len(prompt) - 1
                    inputs = {
                        "target_tokens": tokens[1:],
                        "logprobs": [0.0] * before + one.logprobs,
                        "advantages": [0.0] * before + [advantage] * len(one.tokens),
                    }
                    data.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
            learned = model.forward_backward(data, "importance_sampling")
            stepped = model.optim_step(types.AdamParams(learning_rate=1e-2))
            learned.result(), stepped.result()
            curve.append(sum(rewards) / len(rewards))
            print(f"step {step}: reward {curve[-1]:.3f}", flush=True)
    return curve


if __name__ == "__main__":
    main(*sys.argv[1:])
