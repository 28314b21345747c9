"""Settings of the model, the optimizer and the run's steps."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moetrain.config.base import Section

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""What a run may be called, as a pattern."""


class RunSettings(Section):
    name: str = Field(
        "run",
        description="Name of the run: its folder under output_dir; not given, the configuration file's own. Nothing "
        "is ever overwritten.",
    )
    output_dir: str = Field("runs", description="Folder that holds the runs.")
    seed: int = Field(0, ge=0, description="Seed of weights, data order and every sampled choice.")
    report: bool = Field(
        True, description="Whether the run ends with a page about itself, report.html; it needs moetrain[report]."
    )
    trackers: list[Literal["wandb", "mlflow", "trackio", "swanlab", "comet_ml", "aim", "clearml", "dvclive"]] = Field(
        default_factory=list,
        description="Experiment trackers that get TensorBoard's scalars as well, in a project called moetrain; each "
        "has to be installed, and finds its login where it looks for it. A resumed run is a new one there.",
    )

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(RUN_NAME, name):
            raise ValueError("use letters, digits, '.', '_' and '-' only, beginning with a letter or digit")
        return name


class ModelSettings(Section):
    """OLMoE's architecture under transformers' names."""

    hidden_size: int = Field(256, ge=8, description="Width of the residual stream.")
    num_hidden_layers: int = Field(6, ge=1, description="Number of layers.")
    num_attention_heads: int = Field(4, ge=1, description="Query heads.")
    num_key_value_heads: int | None = Field(
        None, ge=1, description="Key and value heads; null: as many as query heads."
    )
    intermediate_size: int = Field(128, ge=1, description="Width of one expert.")
    num_experts: int = Field(16, ge=1, description="Experts a layer.")
    num_experts_per_tok: int = Field(4, ge=1, description="Experts a token is sent to (top k).")
    num_shared_experts: int = Field(0, ge=0, description="Experts every token goes through beside its top k.")
    norm_topk_prob: bool = Field(False, description="Whether the top-k weights are scaled to sum to one.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    tie_word_embeddings: bool = Field(False, description="Whether input and output embeddings are one matrix.")
    experts: Literal["auto", "megablocks", "grouped_mm", "loop", "dense"] = Field(
        "auto",
        description="Backend of the experts. auto: grouped_mm on CPU; on CUDA the first of megablocks, grouped_mm and "
        "loop that works. dense is the twin of equal active size, without a router.",
    )
    attention: Literal["auto", "flash_attn", "varlen", "sdpa", "batched", "reference"] = Field(
        "auto",
        description="Backend of attention; every one keeps samples apart. auto: batched on CPU; on CUDA the first of "
        "flash_attn, varlen and sdpa that works.",
    )
    balancing: Literal["aux", "bias", "none"] = Field(
        "aux", description="Load balancing: auxiliary loss, loss-free bias on the selection, or none."
    )
    balance_scope: Literal["micro_batch", "global"] = Field(
        "global", description="Tokens over which expert load is counted for balancing: one micro-batch, or the step's."
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="Weight of the load-balancing loss (balancing: aux).")
    router_z_loss_coef: float = Field(0.001, ge=0, description="Weight of the router's z loss.")
    bias_update_rate: float = Field(0.001, ge=0, description="Step of the selection bias (balancing: bias).")
    initialize_from: str | None = Field(
        None,
        description="Weights to start from: a folder of transformers' OLMoE, or OWNER/NAME[@REVISION] of the hub; the "
        "sizes here and tokenizer.model must be its own. null: random ones.",
    )

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @model_validator(mode="after")
    def _shapes(self) -> ModelSettings:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of twice num_attention_heads "
                f"{self.num_attention_heads} (rotary halves each head)"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds num_experts {self.num_experts}: lower it"
            )
        return self


class OptimSettings(Section):
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate as a share of the peak.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine decay; warm-up, stable, then linear decay; or constant."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up.")
    decay_share: float = Field(0.2, gt=0, le=1, description="Last share of the run that wsd decays over.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay; norms and embeddings have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay rate.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    state_precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Precision that AdamW's two moments are kept in; bf16 saves 4 bytes a parameter."
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient; larger ones are scaled down to it.")

    @model_validator(mode="after")
    def _moments_move(self) -> OptimSettings:
        # bf16 resolves a change of 1/256 to 1/128; a step changes a moment by a share of up to 1 - beta. Measured on a
        # small regression, final loss against float32: beta2 0.95 and 0.98 within 0.3%, 0.99 1.4%, 0.999 4.8% worse.
        if self.state_precision == "bf16" and max(self.beta1, self.beta2) > 0.98:
            raise ValueError(
                f"state_precision bf16 rounds away what a step changes with beta1 {self.beta1} and beta2 {self.beta2}: "
                "set both to 0.98 or less, or state_precision to fp32"
            )
        return self


class TrainSettings(Section):
    max_steps: int | None = Field(None, ge=1, description="Steps to train; null trains the whole stream once.")
    batch_rows: int = Field(16, ge=1, description="Rows of a step over all processes: the global batch.")
    micro_batch_rows: int | None = Field(
        None, ge=1, description="Rows of one forward pass; null takes the process's whole share of the batch."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Compute precision; auto takes bf16 where the hardware is fast at it. Weights stay fp32."
    )
    sharding: Literal["none", "fsdp", "hybrid"] = Field(
        "none",
        description="What a process keeps of weights, gradients and moments. none: all; fsdp: its share over all "
        "processes; hybrid: its share over those of its machine.",
    )
    compile: bool = Field(
        False,
        description="Compile each layer by torch.compile: fewer passes over memory on CUDA, for a minute at the start. "
        "Needs Triton on CUDA, a C++ compiler on CPU.",
    )
    activation_checkpointing: bool = Field(False, description="Recompute each layer in backward to save memory.")
    deterministic: bool | None = Field(
        None, description="Same hardware, same bits; null: on for CPU, off for CUDA, where it costs speed."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a process; null shares the machine's cores among its processes."
    )
    resume: str = Field(
        "auto",
        description="auto: continue the newest unfinished run of this name with the same settings, else start NAME-2; "
        "never: always a new name; or the path of a checkpoint.",
    )
    log_every: int = Field(10, ge=1, description="Steps between points of the training curves.")
    eval_every: int = Field(250, ge=1, description="Steps between readings of the validation loss; also at the end.")
    eval_tokens: int = Field(32_768, ge=1, description="Held-out tokens read by domain at each of them.")
    checkpoint_every: int | None = Field(1000, ge=1, description="Steps between checkpoints; null: only at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="Newest checkpoints that are kept.")
    keep_every: int | None = Field(
        None, ge=1, description="Checkpoints of steps that are its multiples are kept as well; null: none are."
    )

    @model_validator(mode="after")
    def _batch(self) -> TrainSettings:
        if self.micro_batch_rows is not None and self.batch_rows % self.micro_batch_rows:
            raise ValueError(
                f"batch_rows {self.batch_rows} must be a multiple of micro_batch_rows {self.micro_batch_rows}"
            )
        if self.keep_every and (self.checkpoint_every is None or self.keep_every % self.checkpoint_every):
            raise ValueError(
                f"keep_every {self.keep_every} must be a multiple of checkpoint_every {self.checkpoint_every}"
            )
        return self


class GuardSettings(Section):
    """When something that training survives is told as an event, and when it stops."""

    skipped: int = Field(
        10,
        ge=1,
        description="Updates skipped in a row, loss or gradient not being finite, at which training stops.",
    )
    spike: float = Field(
        6.0, gt=0, description="Standard deviations above the mean of earlier steps from which on a loss is a spike."
    )
    spike_window: int = Field(
        128, ge=4, description="Earlier steps that a loss is compared with; nothing is said before half of them."
    )
    dead_steps: int = Field(100, ge=1, description="Steps without a token after which an expert counts as dead.")
    samples: int = Field(8, ge=0, description="Samples most involved that an event names.")
