"""Every command line of the golden runs, and the names that changed since they were recorded.

When an option is renamed, this is the only file to change. When a metric is renamed, it gets a line in RENAMED, so that
what was recorded need not be recorded again.
"""

from __future__ import annotations

from dataclasses import dataclass

# Recorded name -> name today: of metrics in metrics.jsonl, and of fields in the files of rollouts/.
RENAMED: dict[str, str] = {}

# A model of 19,000 parameters whose sizes are multiples of 16, so that the compiled CPU kernels apply to it.
TINY = (
    "model.tiny.hidden_size=32 model.tiny.num_heads=2 model.tiny.num_kv_heads=1 model.tiny.num_layers=2 "
    "model.tiny.ffn_size=48"
)
# Everything is written down: each episode, and the last checkpoint. Evaluations draw at temperature 1, since the
# greedy answers of such a model are all alike.
RECORDED = (
    "run.threads=1 run.dir=run tracking.rollouts_every=1 checkpoint.keep_best=false eval.num_prompts=8 "
    "eval.every_steps=2 eval.temperature=1 batch.share_prefixes=false"  # as rows were computed when this was recorded
)
# Sums of single digits: after a few supervised steps most answers are digits and some are right, so that groups have
# different rewards and gradients are not zero.
SUMS = (
    "env.options.min_digits=1 env.options.max_digits=1 env.options.work=false env.options.partial=0.25 "
    "sampler.max_new_tokens=4"
)
WARMUP = "warmup.num_steps=12 warmup.rows_per_step=64 warmup.lr=2e-2"
STEPS = "batch.num_steps=3 batch.prompts_per_step=8 batch.samples_per_prompt=8 optim.lr=3e-3"


@dataclass(frozen=True)
class Recipe:
    """One golden run. `needs`: a recipe whose run folder it reads, as ../<name>/run."""

    options: str
    module: str = "skyrl.train"
    ranks: int = 1
    needs: str = ""


RECIPES: dict[str, Recipe] = {
    "default": Recipe(f"{TINY} {RECORDED} {SUMS} {WARMUP} {STEPS}"),
    "sft": Recipe(f"{TINY} {RECORDED} {SUMS} {WARMUP} checkpoint.every_steps=6", module="skyrl.sft"),
    # Over the frozen export of the run before; the reference of the KL term is the bare base.
    "lora": Recipe(
        f"experiment=arithmetic_lora model.path=../sft/run/export model.lora.rank=4 {RECORDED} {SUMS} "
        f"{STEPS} algorithm.kl.coef=0.05",
        needs="sft",
    ),
    # A value model, a first step in which it alone learns, two passes over each batch, KL as a part of the reward.
    "critic": Recipe(
        f"experiment=ppo_critic {TINY} {RECORDED} {SUMS} {WARMUP} {STEPS} algorithm.critic.warmup_steps=1 "
        "batch.epochs_per_batch=2 algorithm.kl.coef=0.1 algorithm.kl.placement=reward"
    ),
    # Several turns, groups without variance dropped and made up for; log-probabilities taken anew before the update.
    "game": Recipe(
        f"experiment=guess_number {TINY} {RECORDED} {STEPS} env.options.high=5 algorithm=dapo "
        "algorithm.filters.overlong=keep algorithm.filters.overlong_buffer=0 algorithm.loss.recompute_old_logprobs=true"
    ),
    # Sharded over two ranks, two optimizer steps per batch, a loss with one ratio per sequence.
    "fsdp": Recipe(
        f"{TINY} {RECORDED} {SUMS} {WARMUP} {STEPS} strategy=fsdp algorithm=gspo batch.optim_steps_per_batch=2", ranks=2
    ),
}

# ---- runs that were stopped after a checkpoint, in checkpoint/<name>/, and go on from it

# One layer: what is stored is the checkpoint of such a model, some 200 KB of weights, moments and names.
SMALLEST = (
    "model.tiny.hidden_size=16 model.tiny.num_heads=1 model.tiny.num_kv_heads=1 model.tiny.num_layers=1 "
    "model.tiny.ffn_size=16"
)
SAVED = (
    "batch.num_steps=4 batch.prompts_per_step=8 batch.samples_per_prompt=4 optim.lr=3e-3 checkpoint.every_steps=2 "
    "checkpoint.keep_last=0"
)
SAVED_STEP = 2

CHECKPOINTS: dict[str, str] = {
    # Policy, reference and value model, optimizer state of two of them, and an adaptive KL coefficient.
    "critic": (
        f"experiment=ppo_critic {SMALLEST} {RECORDED} {SUMS} warmup.num_steps=8 warmup.rows_per_step=64 warmup.lr=2e-2 "
        f"{SAVED} algorithm.critic.warmup_steps=1 algorithm.kl.coef=0.1 algorithm.kl.placement=reward "
        "algorithm.kl.target=0.01 algorithm.kl.horizon=64"
    ),
    # An adapter and its optimizer state; the base is the random model itself.
    "lora": f"{SMALLEST} {RECORDED} {SUMS} {WARMUP} {SAVED} model.lora.rank=4",
}

# ---- the server

SERVER = (
    f"{TINY} model.chat_template=chat.jinja run.threads=1 service.folder=state service.keys_file=keys.txt "
    "service.max_request_mib=2 service.max_queued_samples=16"
)
# Written into the folder in which it starts.
SERVER_FILES = {
    "keys.txt": "ann:tml-ann\nbob:tml-bob\n",
    "chat.jinja": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: ",
}
