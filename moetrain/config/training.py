"""Settings of the model, the optimizer and the run's steps."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from moetrain.config.base import Section

RUN_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Pattern of valid run names."""


class RunSettings(Section):
    name: str = Field(
        "run",
        description="Name of the run and of its folder in output_dir; default: the name of the configuration file. "
        "Nothing is ever overwritten.",
    )
    output_dir: str = Field("runs", description="Folder that holds the runs.")
    seed: int = Field(0, ge=0, description="Seed of weights, data order and all random choices.")
    report: bool = Field(True, description="Write report.html at the end of the run; needs moetrain[report].")
    trackers: list[Literal["wandb", "mlflow", "trackio", "swanlab", "comet_ml", "aim", "clearml", "dvclive"]] = Field(
        default_factory=list,
        description="Experiment trackers that also get TensorBoard's scalars, in a project named moetrain. Each must "
        "be installed and logged in. wandb, mlflow and trackio also get the heat maps and the report at the end, and a "
        "resumed run goes on there; at the others it is a new run.",
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
    head_dim: int | None = Field(None, ge=2, description="Width of a head; null: hidden_size / num_attention_heads.")
    qk_norm: Literal["width", "head"] = Field(
        "width",
        description="Norm of queries and keys. width: over all heads together (OLMoE); head: over each (Qwen3-MoE).",
    )
    intermediate_size: int = Field(128, ge=1, description="Width of one expert.")
    num_experts: int = Field(16, ge=1, description="Experts per layer.")
    num_experts_per_tok: int = Field(4, ge=1, description="Experts per token (top k).")
    num_shared_experts: int = Field(0, ge=0, description="Experts that every token uses in addition to its top k.")
    norm_topk_prob: bool = Field(False, description="Scale the top-k weights to sum to one.")
    rms_norm_eps: float = Field(1e-5, gt=0, description="Epsilon of RMSNorm.")
    rope_theta: float = Field(10_000.0, gt=0, description="Base of the rotary frequencies.")
    initializer_range: float = Field(0.02, gt=0, description="Standard deviation of the initial weights.")
    tie_word_embeddings: bool = Field(False, description="Use one matrix for input and output embeddings.")
    experts: Literal["auto", "megablocks", "grouped_mm", "loop", "dense"] = Field(
        "auto",
        description="Backend of the experts. auto: the first that works of megablocks (CUDA only), grouped_mm and "
        "loop; grouped_mm needs a hidden_size and intermediate_size that are multiples of 8 (fp32: 4). dense: a dense "
        "model of equal active size, without a router.",
    )
    dense_experts: int = Field(
        0,
        ge=0,
        description="With experts: dense, blocks of equally many consecutive hidden units per feed-forward layer that "
        "the monitor treats as experts; 0: the dense model is not monitored.",
    )
    attention: Literal["auto", "flash_attn", "varlen", "sdpa", "batched", "reference"] = Field(
        "auto",
        description="Backend of attention; all of them attend within samples only. auto: batched on CPU; on CUDA the "
        "first of flash_attn, varlen and sdpa that works.",
    )
    balancing: Literal["aux", "bias", "none"] = Field(
        "aux", description="Load balancing. aux: auxiliary loss; bias: loss-free, by a bias on the selection; none."
    )
    balance_scope: Literal["micro_batch", "global"] = Field(
        "global",
        description="Tokens over which expert load is counted for balancing: those of a micro-batch, or of the step.",
    )
    router_aux_loss_coef: float = Field(0.01, ge=0, description="Weight of the load-balancing loss (balancing: aux).")
    router_z_loss_coef: float = Field(0.001, ge=0, description="Weight of the router's z loss.")
    bias_update_rate: float = Field(0.001, ge=0, description="Step size of the selection bias (balancing: bias).")
    initialize_from: str | None = Field(
        None,
        description="Initial weights: a folder of transformers' OLMoE or Qwen3-MoE, or OWNER/NAME[@REVISION] of the "
        "hub. Sizes and tokenizer.model must agree with it. null: random weights.",
    )

    @property
    def key_value_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def dense_width(self) -> int:
        """Hidden units of a feed-forward layer of the dense model: as many as the experts of a token have."""
        return (self.num_experts_per_tok + self.num_shared_experts) * self.intermediate_size

    @property
    def recorded_experts(self) -> int:
        """Experts per layer that routing is recorded over: routed ones, or blocks of a dense model; 0: none is."""
        return self.dense_experts if self.experts == "dense" else self.num_experts

    @model_validator(mode="after")
    def _shapes(self) -> ModelSettings:
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even (rotary halves each head)")
        if self.head_dim is None and self.hidden_size % (2 * self.num_attention_heads):
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
        if self.experts == "dense" and self.dense_experts and self.dense_width % self.dense_experts:
            raise ValueError(
                f"dense_experts {self.dense_experts} must divide the {self.dense_width} hidden units of a layer "
                "((num_experts_per_tok + num_shared_experts) * intermediate_size)"
            )
        return self


class OptimSettings(Section):
    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="adamw, or muon: Muon for the matrices of attention and experts, AdamW for embeddings, head, "
        "routers and norms. Updates have the size of AdamW's, so learning_rate and weight_decay serve both.",
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1, description="Final learning rate as a share of the peak.")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="After warm-up: cosine decay; warm-up, stable, then linear decay; or constant."
    )
    warmup_steps: int = Field(100, ge=0, description="Steps of linear warm-up.")
    decay_share: float = Field(0.2, gt=0, le=1, description="Last share of the run, over which wsd decays.")
    weight_decay: float = Field(0.1, ge=0, description="Decoupled weight decay; norms and embeddings have none.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first decay rate.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's second decay rate.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum (Nesterov).")
    state_precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Dtype of AdamW's two moments and of Muon's momentum; bf16 takes half the memory.",
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest gradient norm; larger gradients are scaled down to it.")

    @model_validator(mode="after")
    def _moments_change(self) -> OptimSettings:
        # bf16 resolves a change of 1/256 to 1/128; a step changes a moment by a share of up to 1 - beta. Measured on a
        # small regression, final loss against float32: beta2 0.95 and 0.98 within 0.3%, 0.99 1.4%, 0.999 4.8% worse.
        if self.state_precision == "bf16" and max(self.beta1, self.beta2) > 0.98:
            raise ValueError(
                f"state_precision bf16 rounds away what a step changes with beta1 {self.beta1} and beta2 {self.beta2}: "
                "set both to 0.98 or less, or state_precision to fp32"
            )
        if self.state_precision == "bf16" and self.name == "muon" and self.momentum > 0.98:
            raise ValueError(
                f"state_precision bf16 rounds away what a step changes with momentum {self.momentum}: set it to 0.98 "
                "or less, or state_precision to fp32"
            )
        return self


class TrainSettings(Section):
    max_steps: int | None = Field(None, ge=1, description="Steps to train; null: the whole stream once.")
    batch_rows: int = Field(16, ge=1, description="Rows of a step over all ranks: the global batch.")
    micro_batch_rows: int | None = Field(
        None, ge=1, description="Rows of a forward pass on one rank; null: the rank's whole share of the batch."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="Dtype of computation; auto: bf16 if the hardware is fast at it. Weights stay fp32."
    )
    sharding: Literal["none", "fsdp", "hybrid"] = Field(
        "none",
        description="Sharding of weights, gradients and moments. none: every rank has all of them; fsdp: sharded "
        "over all ranks; hybrid: sharded over the ranks of a machine, replicated over machines.",
    )
    expert_parallel: int = Field(
        1,
        ge=1,
        description="Ranks over which the experts of each layer are split; tokens travel to them and back "
        "(all-to-all). It must divide model.num_experts, and the ranks that share a replica (unsharded: all ranks).",
    )
    compile: bool = Field(
        False,
        description="Compile each layer with torch.compile: fewer passes over memory on CUDA, a minute longer to "
        "start. Needs Triton on CUDA, a C++ compiler on CPU.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute each layer in the backward pass to save memory."
    )
    deterministic: bool | None = Field(
        None,
        description="Bit-for-bit reproducible on the same hardware; null: on for CPU, off for CUDA, where it is "
        "slower.",
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads per rank; null: the cores of the machine divided by its ranks."
    )
    resume: str = Field(
        "auto",
        description="auto: resume the newest unfinished run of this name if its settings agree, else start NAME-2; "
        "never: always start a new run; or the path of a checkpoint. From one, a run may go on with more steps, "
        "another schedule, other weights or added domains: it is then a new run, and the other stays as it is.",
    )
    log_every: int = Field(10, ge=1, description="Steps between points of the training curves.")
    eval_every: int = Field(
        250, ge=1, description="Steps between evaluations of the validation loss; one more is at the end."
    )
    eval_tokens: int = Field(32_768, ge=1, description="Held-out tokens per domain in each evaluation.")
    checkpoint_every: int | None = Field(1000, ge=1, description="Steps between checkpoints; null: only at the end.")
    keep_checkpoints: int = Field(2, ge=1, description="Number of newest checkpoints that are kept.")
    keep_every: int | None = Field(
        None, ge=1, description="Also keep the checkpoints of steps that are multiples of this; null: none."
    )

    background_checkpoints: bool | None = Field(
        None,
        description="Write checkpoints in a thread, from a copy of weights and moments in host memory: training waits "
        "for the copy alone. null: where the copy fits into half of the available memory.",
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
    """When an incident is reported as an event, and when training stops."""

    skipped: int = Field(
        10,
        ge=1,
        description="Consecutive updates skipped for a non-finite loss or gradient after which training stops.",
    )
    spike: float = Field(
        6.0, gt=0, description="Standard deviations above the mean of earlier steps at which a loss counts as a spike."
    )
    spike_window: int = Field(
        128, ge=4, description="Earlier steps that a loss is compared with; no spike is reported before half of them."
    )
    dead_steps: int = Field(100, ge=1, description="Steps without a token after which an expert counts as dead.")
    samples: int = Field(8, ge=0, description="Samples most involved in an incident that its event names.")
