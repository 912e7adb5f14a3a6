"""Options of what serves HTTP: the Tinker server, live feedback, the dashboard. A part of schema.py."""

from __future__ import annotations

from dataclasses import dataclass, field

PathStr = str
"""Type of every option that may be a path of this machine: a leading `~` is the home folder (config.load)."""


@dataclass(frozen=True)
class ServiceConfig:
    """The server's address, keys, names, limits and patience (skyrl.serve)."""

    host: str = "127.0.0.1"
    """Address to listen on. Another than loopback needs keys, or allow_anonymous=true."""
    port: int = 8000
    """Port; 0 = any free one, which is printed."""
    folder: PathStr = "service"
    """Where sessions, results and checkpoints are kept; the same folder goes on where it stopped."""
    keys_file: PathStr = ""
    """File with one `name:key` a line; the name owns what is made with the key. "" = SKYRL_API_KEYS (the same, entries
    separated by commas), or no keys at all: then everyone is the owner `local`."""
    allow_anonymous: bool = False
    """Listens on other addresses than loopback without keys: whoever reaches the port may use everything."""
    aliases: dict[str, PathStr] = field(default_factory=dict)
    """Names that clients ask for -> weights; "" or model.path = the model served here, and nothing else is possible:
    'service.aliases={Qwen/Qwen3-8B: ""}'."""
    aliases_file: PathStr = ""
    """The same as aliases, as a YAML or JSON mapping in a file; for names with a colon too."""
    tokenizer_id: PathStr = ""
    """What clients load as the tokenizer (folder or hub name); "" = model.tokenizer, or model.path if it is no tiny
    one."""
    max_models: int = 128
    """Models of all clients that may be open at a time."""
    max_resident_models: int = 32
    """Models whose weights and optimizer state stay on the device; the others wait in host memory."""
    max_rank: int = 128
    """Largest LoRA rank that a client may ask for."""
    full_parameters: bool = False
    """Trains all parameters: exactly one model at a time, asked for with LoRA rank 0."""
    mix_tenants: str = "auto"
    """Rows of several models in one forward pass: always, never, or auto (wherever that leaves results bit for bit
    as they are alone)."""
    max_queued_samples: int = 16384
    """Sequences that may wait or run, of all clients; further requests are answered with 429."""
    max_request_mib: int = 64
    """Largest body of one request; a larger one is refused before it is read."""
    max_tokens_per_request: int = 4194304
    """Most tokens of one training request, or of prompt and answers of one sampling request."""
    model_idle_seconds: float = 3600.0
    """Silence of a session (no request, no heartbeat) after which it has ended and its models are closed; 0 = never."""
    gap_seconds: float = 30.0
    """How long a request waits for one with an earlier number that never came; then it goes on without it."""
    slice_seconds: float = 0.25
    """Longest stretch of sampling before training requests that wait get their turn."""
    loss_substitutes: dict[str, str] = field(default_factory=dict)
    """A loss whose mathematics are not public -> the one that is computed in its place, which every answer then names:
    'service.loss_substitutes={stable_reinforce: ppo}'. Without it such a loss is refused."""


@dataclass(frozen=True)
class FeedbackConfig:
    """Live feedback on answers of the OpenAI-style endpoints: kept by skyrl.serve, learned from by skyrl.train."""

    enabled: bool = False
    """skyrl.serve: keeps answers and takes POST /feedback. skyrl.train: serves the policy, and learns from the feedback
    on its answers instead of sampling prompts; a step begins when batch.prompts_per_step rated answers are there."""
    folder: PathStr = ""
    """Where the queue lies, on a local disk; "" = the folder `feedback` in run.dir, or in service.folder."""
    max_versions: int = 8
    """Optimizer steps by which the weights that gave an answer may differ from those that learn from it."""
    max_seconds: float = 86400.0
    """Age of an answer after which it is neither rated nor learned from."""
    rate_per_minute: int = 120
    """Posts of feedback from one key in a minute (without keys: from one address)."""
    reward_limit: float = 1.0
    """Rewards and objectives lie between minus this and this, which are also what thumbs down and up mean."""
    max_share: float = 0.5
    """Largest part of one step's rows that is of one key, where there are several; 1 = no bound."""
    objectives: list[str] = field(default_factory=list)
    """Names of the objectives that clients may give beside a plain reward; algorithm.objectives weighs them."""


@dataclass(frozen=True)
class DashboardConfig:
    """The web page over run folders: `skyrl-tx dashboard`, or beside a run or server."""

    enabled: bool = False
    """Serves the dashboard from rank 0 while the run or server is up; it never slows or ends it."""
    runs: PathStr = ""
    """Folder of run folders that it shows; "" = the folder in which run.dir lies (skyrl.serve: the folder runs)."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 6007
    """Port; 0 = any free one, which is printed."""
    path_prefix: str = ""
    """Where it lies behind a reverse proxy that passes the whole path on, for example /skyrl; "" = at /."""
    public_url: str = ""
    """Its address behind a reverse proxy, with the prefix: https://ml.example.org/skyrl. Links and the provider's
    answers go there; headers that a proxy adds are not trusted."""
    session_hours: float = 12.0
    """Hours after which people log in again; groups are looked up then."""
    allow_remote_token: bool = False
    """Listens on other addresses than loopback without oidc_issuer: whoever has the link may log in, and what is sent
    can be read on the way."""
    oidc_issuer: str = ""
    """OpenID Connect provider where people sign in, as it names itself; "" = a link that is printed logs in, once."""
    oidc_client_id: str = ""
    """The dashboard's name at the provider, where <public_url>/callback must be allowed."""
    oidc_client_secret_file: PathStr = ""
    """File with the client secret; "" = a public client, which has none (PKCE guards it either way)."""
    oidc_groups_claim: str = "groups"
    """Claim of the ID token, or of userinfo, with a person's groups; dots lead deeper: realm_access.roles."""
    viewer_groups: list[str] = field(default_factory=list)
    """Groups whose members see all runs."""
    admin_groups: list[str] = field(default_factory=list)
    """Groups whose members also make and revoke links to single runs."""
