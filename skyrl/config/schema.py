"""Every option: name, default, unit, effect. The dataclasses are the truth; YAML only overrides them.

Nothing here reads another option: numbers that follow from several options are computed once, in plan.py, which also
holds every check that crosses a border. "0 = off" and "0 = automatic" are said where they hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skyrl.config.schema_policy import (
    ObjectivesConfig,
    OptimConfig,
    ReferenceConfig,
    RouterConfig,
    SelfImitationConfig,
)
from skyrl.config.schema_server import DashboardConfig, FeedbackConfig, PathStr, ServiceConfig
from skyrl.config.trainers import DistillConfig, PreferenceConfig, RewardModelConfig


@dataclass(frozen=True)
class TinyModelConfig:
    """Shape of the random Qwen3-architecture model that `model.path=tiny` builds."""

    hidden_size: int = 256
    """Channels."""
    num_layers: int = 4
    """Decoder layers."""
    num_heads: int = 4
    """Query heads; each has hidden_size / num_heads channels."""
    num_kv_heads: int = 2
    """Key/value heads; divides num_heads."""
    ffn_size: int = 704
    """Channels inside the MLP."""
    vocab_size: int = 0
    """Rows of the embedding; 0 = as many as the tokenizer has. More than that is padded, fewer is refused."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank instead of all weights, LoRA (arXiv 2106.09685): the model stays frozen, and beside each
    product a small A and B learn. For skyrl.train and skyrl.sft: clients of a server ask for their own."""

    rank: int = 0
    """Rows of A and columns of B; 0 = no adapters, all weights are trained."""
    alpha: float = 32.0
    """What an adapter adds is alpha / rank * B A."""
    train_mlp: bool = True
    """Adapts the feed-forward layers, all experts of a mixture too."""
    train_attn: bool = True
    """Adapts the projections of attention."""
    train_unembed: bool = True
    """Adapts the output embedding."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model is trained, and in which numbers."""

    path: PathStr = "tiny"
    """`tiny` (built here, random), a local folder in Hugging Face format, a GGUF file, or a hub name."""
    revision: str = ""
    """Branch or commit of a hub name; "" = the default one."""
    tokenizer: PathStr = ""
    """Folder or hub name of the tokenizer; "" = the model's own."""
    chat_template: PathStr = ""
    """File with a Jinja chat template that replaces the tokenizer's; "" = the tokenizer's, or plain text without."""
    trust_remote_code: bool = False
    """Runs code that comes with the model. Only for models you have read."""
    dtype: str = "auto"
    """Numbers of the forward pass: float32, bfloat16 or float64. auto = bfloat16 on a GPU (float32 below compute
    capability 8.0), float32 on a CPU.
    Masters, gradients' sums and optimizer state are float32 for bfloat16."""
    head_dtype: str = "auto"
    """Numbers of the output head, in training and sampling: auto = dtype; float32 = logits and their gradient are not
    rounded to bfloat16, while weights and hidden states stay in it. Changes nothing for other dtypes."""
    activation_checkpointing: bool = False
    """Recomputes each decoder layer in the backward pass: about 30 % more time for much less memory."""
    compile: bool = False
    """Compiles the decoder layers, one program for all of them, by torch.compile for training and scoring, as
    torchtitan does; half a minute at first. On a CPU in float32 the log-probabilities of training then are no longer
    the sampler's to the bit. Not with float64, adapters, DeepSpeed, or without a C++ compiler (on a GPU Triton too)."""
    logits_chunk_tokens: int = 0
    """Rows of the logits that exist at once; 0 = automatic (64 MiB of float32)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Trains adapters over the frozen model instead of the model."""
    tiny: TinyModelConfig = field(default_factory=TinyModelConfig)
    """Only with path=tiny."""


@dataclass(frozen=True)
class StrategyConfig:
    """How weights, gradients and optimizer state are laid out over the ranks."""

    name: str = "auto"
    """single (one process), ddp (whole model on each rank), fsdp (FSDP2 shards), hsdp (FSDP2 shards within groups of
    ranks), zero1, zero2, zero3 (DeepSpeed). auto = single or ddp."""
    device: str = "auto"
    """cpu or cuda. auto = cuda where there is one; a GPU that torch cannot use is refused, unless this is cpu."""
    reshard_after_forward: bool = True
    """fsdp, hsdp: frees each layer's gathered weights after its forward; false keeps them (faster, more memory)."""
    shard_size: int = 0
    """hsdp: neighbouring ranks that share one copy of the model, for example the GPUs of a node; it divides the number
    of ranks."""
    offload: str = "none"
    """What lives in CPU memory: none; optimizer (masters, moments and the optimizer step: zero1, zero2, zero3); all
    (weights too: zero3, fsdp, hsdp)."""


@dataclass(frozen=True)
class SamplerConfig:
    """How sequences are drawn, in training and as the default of evaluation."""

    temperature: float = 1.0
    """Divides the logits. 0 = greedy, for evaluation only: a policy gradient needs a temperature above 0."""
    top_k: int = 0
    """Draws from the k likeliest tokens only; 0 = off. In training each draw's tokens are recorded, and the update sees
    the softmax over these."""
    top_p: float = 1.0
    """Draws from the smallest set with this probability; 1 = off. Recorded in training like top_k."""
    min_p: float = 0.0
    """Drops tokens less likely than min_p times the likeliest; 0 = off. Recorded in training like top_k."""
    max_new_tokens: int = 16
    """Limit of one turn."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a turn; they stay in its tokens."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Token ids that end a turn, besides those that the tokenizer, config.json and generation_config.json name."""
    backend: str = "auto"
    """auto; module (the model's own forward); fused (a decode plan over the same parameters, common architectures)."""
    block_tokens: int = 16
    """Tokens of one KV-cache block."""
    max_running: int = 0
    """Sequences decoded together on one rank; 0 = automatic."""
    kv_cache_gib: float = 0.0
    """Memory of the KV cache on one rank; 0 = automatic: what the plan says, or what training leaves of a GPU if that
    is less; at most 1 GiB on a CPU."""
    keep_memory: str = "auto"
    """Whether the KV cache, CUDA graphs and, under sharding, the whole copy of the weights stay while training: always;
    never (built again for each rollout, which takes seconds); auto = always where half the cache fits beside it."""
    prefix_cache: bool = True
    """Lets requests with equal beginnings share blocks."""
    cuda_graphs: bool = True
    """Replays decode steps as CUDA graphs. No effect on a CPU."""


@dataclass(frozen=True)
class BatchConfig:
    """What one step of the loop is made of. World size never changes it."""

    num_steps: int = 100
    """Steps of the loop."""
    prompts_per_step: int = 32
    """Prompts whose groups make one step, over all ranks."""
    samples_per_prompt: int = 8
    """Episodes of one prompt: the group."""
    optim_steps_per_batch: int = 1
    """Optimizer steps made of one batch, each from prompts_per_step / this many prompts."""
    epochs_per_batch: int = 1
    """Passes over each batch; above 1 the data becomes stale and the loss must have ratios."""
    max_tokens_per_microbatch: int = 8192
    """Tokens of one forward pass on one rank; no effect on results."""
    packing: bool = True
    """Rows end to end without padding. false: one padded row per sequence (slow; to compare)."""
    share_prefixes: bool = True
    """Computes a beginning that rows of a micro-batch share, as the samples of a prompt do, once in training and
    scoring, where that leaves at most nine tenths of the tokens: up to samples_per_prompt times fewer where prompts are
    long and answers short. Values stay the same; gradients differ in rounding. Needs packing. false: rows apart."""
    max_row_tokens: int = 0
    """Longest row (prompt and answers); longer episodes end with stop reason "length". 0 = the model's own limit."""


@dataclass(frozen=True)
class AdvantageConfig:
    """From rewards to advantages."""

    name: str = "grpo"
    """grpo, grpo_batch_std, dr_grpo, rloo, opo, maxrl, pass_at_k, mt_grpo, reinforce++, reinforce++_baseline, remax;
    with a critic gae, vapo, vtrace; or a plugin's. docs/papers.md says what each is."""
    params: dict[str, float] = field(default_factory=dict)
    """Its parameters, for example algorithm.advantage.params.gamma; what is left out has its declared default."""


@dataclass(frozen=True)
class LossConfig:
    """From log-probabilities and advantages to the loss of each token."""

    name: str = "ppo"
    """importance_sampling, reinforce, ppo, cispo, sapo, dppo_tv, dppo_kl, clip_cov, kl_cov, dro; by whole rows gspo,
    gmpo, vespo, dro_sequence; or a plugin's. docs/papers.md says what each is."""
    params: dict[str, float] = field(default_factory=dict)
    """Its parameters, for example algorithm.loss.params.clip_high; what is left out has its declared default."""
    reduction: str = "token_mean"
    """token_mean, sequence_mean, sequence_sum, prompt_mean, prompt_sequence_mean, or constant (divides by
    max_new_tokens, Dr. GRPO)."""
    correction: str = "none"
    """Sampler/trainer mismatch and staleness: none, token_truncate, token_mask, sequence_truncate, sequence_mask,
    geometric_truncate, geometric_mask, off_policy_sequence_mask."""
    correction_cap: float = 2.0
    """Largest ratio: truncation lowers larger ones to it, masks reject them."""
    correction_low: float = 0.0
    """Smallest ratio: truncation raises smaller ones to it, masks reject them; 0 = none, for masks 1 / cap."""
    correction_normalise: bool = False
    """Divides the correction's weights by their mean over the tokens of an optimizer step."""
    top_entropy: float = 1.0
    """Learns from this part of the tokens, those of the highest entropy; the advantage of the rest is 0 (0.2 in arXiv
    2506.01939). One more forward pass for each update when below 1."""
    rejected: str = "counted"
    """Tokens that a mask or top_entropy rejects: counted in the mean that the reduction makes, or dropped from it."""
    recompute_old_logprobs: bool = False
    """Takes the proximal log-probabilities from one extra forward before the update instead of from the sampler."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""


@dataclass(frozen=True)
class KLConfig:
    """Distance to the reference: the model as it was when RL began (or was last synchronised, see
    algorithm.reference), or with model.lora the bare base."""

    coef: float = 0.0
    """Weight; 0 = no reference model at all."""
    estimator: str = "k3"
    """k1, k2 or k3 (J. Schulman, 2020), abs; k1+, k3+, abs+ with the gradient of k2; k3_ratio, off-policy unbiased."""
    placement: str = "loss"
    """loss: a term of the loss. reward: subtracted from each token's reward (reinforce++, mt_grpo or a critic's)."""
    target: float = 0.0
    """Adaptive coefficient that steers the mean KL per token to this; 0 = fixed."""
    horizon: float = 10000.0
    """Episodes over which the adaptive coefficient moves by a factor of at most 1.22 (e^0.2) up, 0.82 down."""


@dataclass(frozen=True)
class FilterConfig:
    """Which episodes are not learned from."""

    zero_variance: bool = False
    """Drops groups whose rewards are all equal."""
    names: list[str] = field(default_factory=list)
    """Registered filters of groups (`register_filter`); a group that one of them does not keep is dropped."""
    refill: bool = False
    """Samples more prompts until prompts_per_step groups are left (dynamic sampling). With zero_variance or names."""
    max_refill_rounds: int = 8
    """Rounds of refill before the step goes on with what it has."""
    overlong: str = "keep"
    """Episodes cut by a length limit: keep, mask (not trained, still in the group's baseline)."""
    overlong_buffer: float = 0.0
    """Part of sampler.max_new_tokens at the end of which an answer loses reward, up to 1 at the limit (DAPO: 0.2)."""


@dataclass(frozen=True)
class CriticConfig:
    """The value model of an advantage with a critic (gae, vapo, vtrace); unused otherwise."""

    lr: float = 1e-4
    """Its peak learning rate. optim.warmup_steps, optim.schedule and optim.final_lr_ratio act on it as on optim.lr."""
    clip: float = 0.2
    """Values may move this far from the ones the advantages used; 0 = off."""
    warmup_steps: int = 0
    """Steps in which only the critic learns."""


@dataclass(frozen=True)
class AlgorithmConfig:
    """The algorithm as independent parts; conf/algorithm holds named combinations."""

    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    kl: KLConfig = field(default_factory=KLConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    self_imitation: SelfImitationConfig = field(default_factory=SelfImitationConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)


@dataclass(frozen=True)
class EnvConfig:
    """What is played."""

    name: str = "arithmetic"
    """A registered environment: one of docs/environments.md (arithmetic, gsm8k, code, tools, ...), or a plugin's."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of that environment; an unknown one is refused."""
    wrappers: list[Any] = field(default_factory=list)
    """Registered wrappers around it, the first innermost: names, or {name: ..., option: ...}."""
    max_turns: int = 1
    """Turns of one episode."""
    max_episode_tokens: int = 0
    """Tokens that the model writes in one episode, over all turns; 0 = what a row has room for."""
    timeout_seconds: float = 20.0
    """Longest call of an environment or reward."""
    workers: int = 2
    """Processes beside each rank that call environments and rewards; our own are quick and called in the rank itself. 0
    = all calls there: one that waits or hangs holds up its rank, and one that dies ends it."""
    max_concurrent: int = 64
    """Calls that are made at the same time for one rank: one for each worker, and as many as this where methods are
    async."""
    worker_memory_gib: float = 4.0
    """Memory of one worker; one that nears it is replaced, and what fails for want of it is masked. 0 = no limit."""
    on_error: str = "stop"
    """An environment or reward that raises, hangs or returns no finite number: stop the run, or mask the episode
    (not trained, counted as `invalid:sum`)."""


@dataclass(frozen=True)
class ControlConfig:
    """Classic control, games and robots from Gymnasium (trainer=control). A step of the loop is n_envs * n_steps steps
    of environments, from which is learned in minibatches, `epochs` times."""

    env_id: str = ""
    """The environment's registered id: CartPole-v1, HalfCheetah-v5, ALE/Pong-v5, or module:Name-v0."""
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of gymnasium.make for it."""
    n_envs: int = 8
    """Environments that are stepped together, over all ranks."""
    vectorization: str = "sync"
    """sync: a rank's environments in its own process; async: each in a process beside it, where a step takes long."""
    max_episode_steps: int = 0
    """Steps after which an episode is cut; 0 = as the environment is registered."""
    preprocess: str = "none"
    """none, or atari: the standard wrappers of Atari games."""
    frame_size: int = 84
    """atari: pixels on each side of a frame."""
    frame_stack: int = 1
    """Observations that the policy sees at a time, the newest last."""
    normalize_observations: bool = False
    """Subtracts the running mean of observations and divides by their running standard deviation, over all ranks."""
    normalize_rewards: bool = False
    """Divides rewards by the running standard deviation of the discounted return, over all ranks."""
    total_steps: int = 100_000
    """Steps of environments in the run, rounded up to whole steps of the loop."""
    n_steps: int = 256
    """Steps of each environment in a step of the loop."""
    minibatch_size: int = 64
    """Steps that one optimizer step learns from, over all ranks; divides n_envs * n_steps."""
    epochs: int = 10
    """Passes over the n_envs * n_steps steps; 1 with minibatch_size = n_envs * n_steps is A2C."""
    value_coef: float = 1.0
    """Weight of the value loss, which is half the squared error: 1 is vf_coef=0.5 elsewhere."""
    target_kl: float = 0.0
    """A step of the loop ends when a minibatch's approximate KL is 1.5 times this; 0 = never."""
    policy: str = "mlp"
    """mlp, cnn, recurrent, or a plugin's (register_policy)."""
    policy_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the policy; an unknown one is refused."""
    critic: str = ""
    """Policy whose kind the critic is of, where the policy returns no values itself; "" = the policy's own."""
    squash: bool = False
    """Continuous actions are the tanh of a normal number, within their bounds, instead of one clipped to them."""
    initial_std: float = 1.0
    """Standard deviation of continuous actions at first."""
    eval_episodes: int = 10
    """Episodes of an evaluation, with the likeliest actions."""
    record_every: int = 0
    """Evaluations between recorded episodes, in <run folder>/episodes; 0 = none."""


@dataclass(frozen=True)
class DataConfig:
    """Where prompts come from. Environments that make their own need nothing here."""

    path: PathStr = ""
    """Training data: a .jsonl file (also packed: .gz, .bz2, .xz, .zst), a .parquet file, or a data set id."""
    eval_path: PathStr = ""
    """Held-out data; "" = the environment's own held-out part, the test file beside a file named train, or else rows of
    data.path that are left out of training, chosen by hash (none with eval.every_steps=0)."""
    shuffle: bool = True
    """A new order in each epoch, keyed by seed and epoch."""
    max_prompt_tokens: int = 0
    """Longer prompts are refused with their line, or left out (filter); 0 = what a row has room for."""
    filter: list[str] = field(default_factory=list)
    """Prompts that are left out and counted instead of refused: too_long, empty (no tokens), refused (by the chat
    template or the tokenizer), or all."""
    max_prompts: int = 0
    """Uses only the first so many; 0 = all."""
    epochs: int = 0
    """Passes over the training rows, in place of batch.num_steps (with skyrl.sft of warmup.num_steps); 0 = off. The
    last step is filled from the next pass."""


@dataclass(frozen=True)
class ChatConfig:
    """How messages become text."""

    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Variables for the chat template, for example chat.template_kwargs={enable_thinking: false}; one that the template
    does not read is refused."""
    skip_special_tokens: bool = False
    """Leaves special tokens (`<think>` where it is one, padding) out of the text that rewards, environments and
    OpenAI-style clients read; they stay in what is trained, and stop strings see them."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    every_steps: int = 10
    """Steps between evaluations; 0 = only before and after. One runs before the first step and one after the last."""
    num_prompts: int = 256
    """Held-out prompts."""
    samples_per_prompt: int = 1
    """Episodes of each."""
    temperature: float = 0.0
    """0 = greedy."""
    sets: list[Any] = field(default_factory=list)
    """What is evaluated besides the run's own held-out prompts (skyrl.evaluate: in their place): environments or
    recipes by name, or mappings {name, env, path, options, num_prompts, samples_per_prompt, temperature,
    max_new_tokens, max_turns}. Their metrics are eval/<name>/..."""
    k: list[int] = field(default_factory=list)
    """Of pass@k and majority@k of these sets; [] = 1, 2, 4, ... up to the samples of a prompt."""
    group_by: list[str] = field(default_factory=lambda: ["difficulty", "level", "data_source", "source"])
    """Fields of a prompt by whose values results are shown too; of source all but its line number."""
    stop_when: str = ""
    """Training ends at the evaluation where this holds, for example "eval/accuracy:mean >= 0.95"; "" = never."""
    patience: int = 0
    """Training ends after so many evaluations in a row without a better checkpoint.best_metric; 0 = never."""


@dataclass(frozen=True)
class WarmupConfig:
    """Supervised training on the environment's own solutions before RL (skyrl.sft)."""

    num_steps: int = 0
    """Optimizer steps; 0 = none."""
    rows_per_step: int = 64
    """Rows of one step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate, with the other numbers of optim."""
    schedule: str = "auto"
    """constant, linear or cosine over num_steps; auto = optim.schedule."""
    warmup_ratio: float = 0.1
    """Part of num_steps over which the rate rises from 0."""


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved and for how long."""

    every_steps: int = 20
    """Steps between checkpoints; 0 = only at the end."""
    keep_last: int = 2
    """Newest checkpoints kept; 0 = all."""
    keep_best: bool = True
    """Saves after each evaluation that is better than those of all checkpoints there are, whatever every_steps says,
    and keeps that checkpoint besides. The first of equals is the best one."""
    best_metric: str = "eval/accuracy:mean"
    """What is best: a metric of the evaluation."""
    best_mode: str = "max"
    """max or min: whether more or less of it is better."""
    async_save: bool = True
    """Writes while the next step samples, and is waited for before that step's update: never more than every_steps
    steps are unsaved."""
    export: bool = True
    """Writes the final weights in Hugging Face format to <run folder>/export; with model.lora the base with the adapter
    merged in, and the adapter alone, as peft loads it, to <run folder>/export/adapter."""
    push_to_hub: str = ""
    """Sends the export to this repository of the Hugging Face Hub, owner/name, at the end of the run. It is made at
    the start, so that a token without the right to write is refused then (HF_TOKEN, or `hf auth login`)."""
    hub_private: bool = True
    """A repository that push_to_hub makes is private; one that is there stays as it is."""


@dataclass(frozen=True)
class TrackingConfig:
    """Where numbers go. metrics.jsonl in the run folder always exists."""

    console: str = "auto"
    """auto (live line on a terminal, plain lines otherwise), lines or off."""
    wandb: str = "off"
    """off, offline or online."""
    wandb_project: str = "skyrl"
    """Project name there, and in Trackio."""
    trackio: bool = False
    """Logs to Trackio, in its folder on this machine (TRACKIO_DIR)."""
    tensorboard: bool = False
    """Writes event files to <run folder>/tensorboard."""
    tags: list[str] = field(default_factory=list)
    """Words that the dashboard and wandb find the run by."""
    rollouts_every: int = 10
    """Steps between dumps of all episodes (text, tokens, log-probs, rewards) to <run folder>/rollouts; 0 = never."""
    peak_tflops: float = 0.0
    """Peak of one device in its dtype, for MFU; 0 = known for common GPUs, else MFU is left out."""
    prometheus_port: int = 0
    """Port where a Prometheus server may fetch a rank's numbers: this plus the rank's number on its node; 0 = off."""
    prometheus_host: str = "127.0.0.1"
    """Address for it; others than loopback let everybody who reaches the port read the numbers."""
    system: bool = True
    """Writes CPU, memory, network, disk, GPU and spans of each step to <run folder>/system, a file for each rank."""


@dataclass(frozen=True)
class AlertsConfig:
    """Where advisories go besides the console and advisories.jsonl: docs/alerts.md."""

    webhook: str = ""
    """An https address that gets each one as JSON in a POST; env:NAME takes it from that environment variable, so that
    a secret address is written nowhere."""
    command: list[str] = field(default_factory=list)
    """A program and its arguments, which gets the same JSON on its standard input."""


@dataclass(frozen=True)
class DebugConfig:
    """Switches for finding what is wrong."""

    deterministic: bool = False
    """Deterministic kernels, one order of everything: two runs give the same bits on one machine."""
    check_replicas_every: int = 0
    """Steps between checks that all ranks hold the same weights; 0 = never."""
    check_weights_every: int = 20
    """Steps between proofs that the sampler draws from the trained weights (checksums, and log-probs of drawn tokens
    against the trainer's); 0 = never."""


@dataclass(frozen=True)
class RunFolderConfig:
    """Name, place and life of a run."""

    name: str = ""
    """"" = experiment, seed and overrides, so that the same command finds its own folder again."""
    dir: PathStr = ""
    """Folder; "" = runs/<name>."""
    resume: PathStr = "auto"
    """auto (newest complete checkpoint of this folder, else a fresh start), never, or the path of a checkpoint or run
    folder. That of another run with other options begins a new run with its weights (run.name names it)."""
    resume_optimizer: bool = True
    """A run that begins with the weights of another takes its optimizer state too."""
    world_size: int = 0
    """Ranks to check the plan for in a dry run; 0 = the real ones. Refused otherwise."""
    threads: int = 0
    """CPU threads of one rank; 0 = automatic (the machine's cores shared by its ranks)."""
    join_seconds: int = 300
    """Longest wait for all ranks to be there at the start."""
    hang_seconds: float = 40.0
    """A rank that makes no progress for so long ends the job, named and with its stack; 0 = never. What is done for the
    first time, loading, saving and export may take ten times as long."""
    collective_timeout_seconds: int = 3600
    """Longest wait for another rank that does make progress (uneven sampling)."""
    allow_different: list[str] = field(default_factory=list)
    """What may differ between the nodes, which are compared at the start: versions, code, data, model, the name of an
    option, or a part of these as the error names it (versions.torch)."""
    must_save_by: str = ""
    """Time by which the run has saved and left: 2026-05-01T18:30:00, or seconds from the start. "" = Slurm's end of
    the job where there is one; never = no deadline."""
    window: str = ""
    """Times of the local clock between which the run works, every day: 22:00-06:00. Before the end it saves and leaves,
    to be started again in the next one; started outside of it, it leaves at once. "" = always."""
    save_margin_seconds: float = 120.0
    """The run begins to stop so long before that time: enough to end an update and to save."""


@dataclass(frozen=True)
class RunConfig:
    """The whole run or, with `service`, the whole server. skyrl.config.options.reads says which command reads what."""

    seed: int = 1
    """Keys every draw: initial weights, data order, samples."""
    dry_run: bool = False
    """Checks the plan, prints it with a memory estimate, and stops."""
    trainer: str = "rl"
    """rl, sft (as skyrl.sft), dpo (preferences), reward_model, distill, or control (Gymnasium, as skyrl.control)."""
    experiment: str = "arithmetic"
    """Set by the recipes in conf/experiment; names the run."""
    plugins: list[str] = field(default_factory=list)
    """Imported on every rank before anything is built, to register environments, rewards, losses and more: a module's
    dotted name, a .py file, or an installed package's entry point of the group skyrl.plugins."""
    model: ModelConfig = field(default_factory=ModelConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    env: EnvConfig = field(default_factory=EnvConfig)
    data: DataConfig = field(default_factory=DataConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    warmup: WarmupConfig = field(default_factory=WarmupConfig)
    preference: PreferenceConfig = field(default_factory=PreferenceConfig)
    reward_model: RewardModelConfig = field(default_factory=RewardModelConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    alerts: AlertsConfig = field(default_factory=AlertsConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    run: RunFolderConfig = field(default_factory=RunFolderConfig)
    service: ServiceConfig = field(default_factory=ServiceConfig)
    feedback: FeedbackConfig = field(default_factory=FeedbackConfig)
    dashboard: DashboardConfig = field(default_factory=DashboardConfig)
