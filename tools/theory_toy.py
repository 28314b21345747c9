"""The paper's toy model: does the pathway edit distance follow the effective dimension of the routing kernel?

    python tools/theory_toy.py                                          # about a minute; tools/results/theory_toy.*
    python tools/theory_toy.py --models 8 --steps 20 --output /tmp/toy  # a quick look

Li, Fan and Zhou (arXiv 2506.21551, section on theory) support Theorem 4.1 with a one-layer mixture of 16 ReLU experts
behind a random frozen router, on 200 samples of 100-dimensional Gaussian clusters: edit distance against effective
dimension. This trains many such models and correlates the two, with controls.

What the paper leaves open was chosen as follows; the JSON file contains this text:
- Families. In "draw" only the seeds differ. Three more vary one quantity each: "scatter", the share of a sample's
  variance that lies within its cluster (0.001 to 1); "clusters", their number (2 to 100); "sharpness", the scale of
  the router's logits (0.2 to 10); all evenly on a logarithmic scale. Otherwise these are 0.02, 10 and 2. Pooled
  correlations mix families and are not evidence by themselves.
- These values were chosen after a first version with a scatter of 0.5 (`--scatter 0.5`; from 0.01 on where it varied),
  in which d_eff was close to 16, the maximum for 16 experts, nearly everywhere. Its Spearman correlations of D_path
  with d_eff, in the order above, 60 models each, were +.30, +.49, +.46, -.73, and without router entropy +.08, +.39,
  +.56, -.21: the same signs. Two short runs with 12 and 16 models per family preceded it.
- Data. Inputs of length about 10: a Gaussian centre and Gaussian noise in 100 dimensions, mixed by the scatter. The
  target is one standard Gaussian number per cluster, plus 0.3 times a fixed linear function of the noise, plus noise of
  0.1. Test: 1000 further samples of the same clusters.
- Model. g(x) = softmax(sharpness W x / 10) with W standard Gaussian, frozen, dense over all experts (no top-k);
  f(x) = sum_e g_e(x) a_e relu(U_e x), 16 hidden units per expert, U and a trained by Adam on squared error.
- Measures. As in `moetrain.grokking`: tau 0.7; d_eff of 64 samples at lambda = 0.01 Tr(H) / 64, and of all 200 at 0.01
  Tr(H) / 200; expert kernels K = 1 and K = <x, x'>. With one layer a pathway is one prefix, without separators.
- Control. Residuals of both quantities on router entropy and its square, which remove the router's sharpness: it
  affects pathway length and the kernel alike. The distance divided by pathway length is reported too.

Intervals are bootstraps over models. Suffixes: M models, S samples, E experts, D input, H hidden units, R resamples.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.machine import processor
from common.command_line import make_parser, reports_errors, write_json
from common.figures import pyplot, save
from numpy.typing import NDArray
from scipy.stats import rankdata

from moetrain.config import SettingsError
from moetrain.grokking import d_eff, d_path_both, effective_dimension, routing_kernel
from moetrain.loggers.terminal import Terminal

Floats = NDArray[np.float64]

EXPERTS, SAMPLES, TEST, WIDTH, HIDDEN = 16, 200, 1000, 100, 16
RIDGE, LEARNING_RATE, RESAMPLES = 0.01, 3e-3, 2000
WITHIN, LABEL_NOISE = 0.3, 0.1
SCATTER, CLUSTERS, SHARPNESS = 0.02, 10, 2.0  # in the families that do not vary them
FAMILIES = {
    "draw": "only seeds differ",
    "scatter": "within clusters",
    "clusters": "their number",
    "sharpness": "of the router",
}
COLORS = {"draw": "#7570b3", "scatter": "#1b9e77", "clusters": "#3182bd", "sharpness": "#d95f02"}
FIGURE_NAMES = ("d_eff", "d_path", "d_path_norm", "entropy", "test_error")
PAIRS = {
    "d_path ~ d_eff": ("d_path", "d_eff"),
    "d_path ~ d_eff (n = 200)": ("d_path", "d_eff_200"),
    "d_path ~ d_eff, linear experts": ("d_path", "d_eff_linear"),
    "d_path_norm ~ d_eff": ("d_path_norm", "d_eff"),
    "d_path ~ test error": ("d_path", "test_error"),
    "d_eff ~ test error": ("d_eff", "test_error"),
}


@dataclass(frozen=True)
class Model:
    """Results of one model. Entropies in nats; errors are squared errors divided by the variance of the targets."""

    family: str
    seed: int
    scatter: float
    clusters: int
    sharpness: float
    d_path: float
    d_path_norm: float
    d_eff: float
    d_eff_200: float
    d_eff_linear: float
    entropy: float
    load_entropy: float
    train_error: float
    test_error: float


def plan(models: int, scatter: float = SCATTER) -> list[dict[str, Any]]:
    """Family, seed, scatter, clusters and sharpness of each model, `models` per family."""
    usual = {"scatter": scatter, "clusters": CLUSTERS, "sharpness": SHARPNESS}
    varied: dict[str, list[Any]] = {
        "scatter": np.geomspace(0.001, 1, models).tolist(),
        "clusters": np.geomspace(2, 100, models).round().astype(int).tolist(),
        "sharpness": np.geomspace(0.2, 10, models).tolist(),
    }
    rows = [{**usual, "family": "draw"} for _ in range(models)]
    rows += [{**usual, "family": name, name: value} for name, values in varied.items() for value in values]
    return [{**row, "seed": seed} for seed, row in enumerate(rows)]


def draw_data(clusters: int, scatter: float, rng: np.random.Generator) -> tuple[Floats, Floats, Floats, Floats]:
    """Training inputs [S, D] and targets [S], then test inputs and targets, of one set of Gaussian clusters."""
    centres = rng.normal(size=(clusters, WIDTH))
    centres *= np.sqrt(WIDTH) / np.linalg.norm(centres, axis=1, keepdims=True)
    levels, direction = rng.normal(size=clusters), rng.normal(size=WIDTH) / np.sqrt(WIDTH)
    member = np.concatenate([rng.permutation(np.arange(SAMPLES) % clusters), rng.integers(clusters, size=TEST)])
    noise = rng.normal(size=(SAMPLES + TEST, WIDTH))
    targets = levels[member] + WITHIN * noise @ direction + LABEL_NOISE * rng.normal(size=len(member))
    inputs = np.sqrt(1 - scatter) * centres[member] + np.sqrt(scatter) * noise
    return inputs[:SAMPLES], targets[:SAMPLES], inputs[SAMPLES:], targets[SAMPLES:]


def route(inputs_SD: Floats, router_ED: Floats, sharpness: float) -> Floats:
    """Routing weights [S, E]: the softmax over all experts."""
    logits_SE = sharpness * inputs_SD @ router_ED.T / np.sqrt(WIDTH)
    weights_SE = np.exp(logits_SE - logits_SE.max(axis=1, keepdims=True))
    return weights_SE / weights_SE.sum(axis=1, keepdims=True)


def train_experts(
    train: tuple[Floats, Floats, Floats], test: tuple[Floats, Floats, Floats], steps: int, seed: int
) -> tuple[float, float]:
    """Squared error in training and test after `steps` full batches, divided by the variance of the test targets.

    train, test: inputs [S, D], routing weights [S, E] and targets [S]; the router is not trained.
    """
    generator = torch.Generator().manual_seed(seed)
    inner_HD = torch.randn(EXPERTS * HIDDEN, WIDTH, generator=generator) * (2 / WIDTH) ** 0.5
    outer_H = torch.randn(EXPERTS * HIDDEN, generator=generator) * (1 / HIDDEN) ** 0.5
    parameters = [inner_HD.requires_grad_(), outer_H.requires_grad_()]
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def error(data: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inputs_SD, gates_SH, targets_S = data
        outputs_S = (gates_SH * torch.relu(inputs_SD @ inner_HD.T)) @ outer_H
        return ((outputs_S - targets_S) ** 2).mean()

    def tensors(data: tuple[Floats, Floats, Floats]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs, weights, targets = (torch.from_numpy(part).float() for part in data)
        return inputs, weights.repeat_interleave(HIDDEN, dim=1), targets

    seen, unseen = tensors(train), tensors(test)
    for _ in range(steps):
        optimizer.zero_grad()
        error(seen).backward()
        optimizer.step()
    variance = float(test[2].var())
    with torch.no_grad():
        return float(error(seen)) / variance, float(error(unseen)) / variance


def run_model(family: str, seed: int, scatter: float, clusters: int, sharpness: float, steps: int) -> Model:
    """Draw, route, measure and train one model."""
    rng = np.random.default_rng([2506, 21551, seed])
    train_x, train_y, test_x, test_y = draw_data(clusters, scatter, rng)
    router_ED = rng.normal(size=(EXPERTS, WIDTH))
    weights_SE, test_SE = route(train_x, router_ED, sharpness), route(test_x, router_ED, sharpness)
    weights_SLE = weights_SE[:, None]
    edits, share = d_path_both(weights_SLE)
    kernel_SS = routing_kernel(weights_SLE)
    train_error, test_error = train_experts((train_x, weights_SE, train_y), (test_x, test_SE, test_y), steps, seed)
    load_E = weights_SE.mean(axis=0)
    return Model(
        family=family,
        seed=seed,
        scatter=scatter,
        clusters=clusters,
        sharpness=sharpness,
        d_path=edits.mean,
        d_path_norm=share.mean,
        d_eff=d_eff(weights_SLE),
        d_eff_200=effective_dimension(kernel_SS, RIDGE * float(np.trace(kernel_SS)) / len(kernel_SS)),
        d_eff_linear=d_eff(weights_SLE, train_x[:, None]),
        entropy=float(_entropy(weights_SE).mean()),
        load_entropy=float(_entropy(load_E)),
        train_error=train_error,
        test_error=test_error,
    )


def _entropy(weights: Floats) -> Any:
    return -(weights * np.log(np.maximum(weights, 1e-300))).sum(axis=-1)


def correlate_models(x_M: Floats, y_M: Floats, control_M: Floats, seed: int = 0) -> dict[str, Any]:
    """Pearson and Spearman correlation of x and y over models, and the same controlled for router entropy.

    The controlled ones correlate residuals on entropy and its square: of the values for Pearson, of ranks for Spearman.
    Returns for each a value and the 2.5% and 97.5% points of a bootstrap over models; NaN where a series does not vary
    or has no residuals, because it is a function of entropy.
    """
    n = len(x_M)
    rows_RS = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    rows_RS = np.concatenate([np.arange(n)[None], rows_RS])  # the first row is the models themselves
    found: dict[str, Any] = {"n": n}
    for method in ("pearson", "spearman"):
        parts = [series[rows_RS] for series in (x_M, y_M, control_M)]
        x, y, control = (rankdata(part, axis=1) for part in parts) if method == "spearman" else parts
        for name, a, b in (
            (method, x, y),
            (f"{method}_without_entropy", residuals(x, control), residuals(y, control)),
        ):
            a, b = (part - part.mean(axis=1, keepdims=True) for part in (a, b))
            scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
            value_R = np.divide((a * b).sum(axis=1), scale, out=np.full(len(scale), np.nan), where=scale > 1e-12)
            resampled_R = value_R[1:][~np.isnan(value_R[1:])]
            undefined = np.isnan(value_R[0]) or len(resampled_R) == 0
            low, high = (np.nan, np.nan) if undefined else np.percentile(resampled_R, [2.5, 97.5])
            found[name] = {"value": float(value_R[0]), "low": float(low), "high": float(high)}
    return found


def residuals(y: Floats, control: Floats) -> Floats:
    """Residuals of each row of y on the same row of the control and its square, [R, M] each."""
    scaled = control - control.mean(axis=1, keepdims=True)
    scaled = scaled / np.maximum(np.abs(scaled).max(axis=1, keepdims=True), 1e-300)
    basis, _ = np.linalg.qr(np.stack([np.ones_like(scaled), scaled, scaled**2], axis=2))
    return y - np.einsum("rmk,rk->rm", basis, np.einsum("rmk,rm->rk", basis, y))


def correlations(models: Sequence[Model]) -> dict[str, dict[str, Any]]:
    """`correlate_models` of each of `PAIRS`, for each family and pooled."""

    def of(chosen: Sequence[Model]) -> dict[str, Any]:
        columns = {name: np.array([getattr(model, name) for model in chosen]) for name in Model.__annotations__}
        return {pair: correlate_models(columns[x], columns[y], columns["entropy"]) for pair, (x, y) in PAIRS.items()}

    groups = {family: [model for model in models if model.family == family] for family in FAMILIES}
    return {**{family: of(chosen) for family, chosen in groups.items()}, "pooled": of(models)}


def conclusion(found: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Whether D_path rises with d_eff, by family: from the intervals of Spearman, raw and controlled for entropy."""

    def words(part: dict[str, Any]) -> str:
        if np.isnan(part["value"]):
            return "is undefined, because D_path or d_eff is a function of entropy"
        relation = (
            "rises with d_eff" if part["low"] > 0 else "falls with d_eff" if part["high"] < 0 else "shows no relation"
        )
        return f"{relation}, {_short(part)}"

    sentences = {}
    for pair, quantity in (("d_path ~ d_eff", "D_path"), ("d_path_norm ~ d_eff", "D_path by length")):
        for name, pairs in found.items():
            row = pairs[pair]
            sentences[f"{pair}, {name}"] = (
                f"{quantity} {words(row['spearman'])}; without router entropy it "
                f"{words(row['spearman_without_entropy'])}; Spearman over {row['n']} models"
            )
    return sentences


def draw_figure(models: Sequence[Model], found: dict[str, dict[str, Any]], path: Path) -> None:
    """Scatter plots: D_path against d_eff, raw, controlled for entropy and by length; test error against d_eff.

    Raises:
        SettingsError: matplotlib is not installed, or the file cannot be written.
    """
    plt = pyplot()

    figure, grid = plt.subplots(2, 2, figsize=(12.5, 11), constrained_layout=True)
    axes = grid.ravel()
    for family, meaning in FAMILIES.items():
        chosen = [model for model in models if model.family == family]
        column = {name: np.array([getattr(model, name) for model in chosen]) for name in FIGURE_NAMES}
        without = {
            name: residuals(rankdata(column[name])[None], rankdata(column["entropy"])[None])[0] / len(chosen)
            for name in ("d_eff", "d_path")
        }
        row, marks = found[family], {"s": 26, "alpha": 0.75, "color": COLORS[family], "linewidths": 0}
        for axis, x, y, part in (
            (axes[0], column["d_eff"], column["d_path"], row["d_path ~ d_eff"]["spearman"]),
            (axes[1], without["d_eff"], without["d_path"], row["d_path ~ d_eff"]["spearman_without_entropy"]),
            (axes[2], column["d_eff"], column["d_path_norm"], row["d_path_norm ~ d_eff"]["spearman"]),
            (axes[3], column["d_eff"], column["test_error"], row["d_eff ~ test error"]["spearman"]),
        ):
            axis.scatter(x, y, label=f"{family} ({meaning}): {_short(part)}", **marks)
    axes[0].set(title="Edit distance", xlabel="d_eff, 64 samples", ylabel="D_path, edits")
    axes[1].set(
        title="Edit distance, router entropy removed",
        xlabel="d_eff: residual on entropy of its rank in the family, as a share",
        ylabel="D_path, likewise",
    )
    axes[2].set(title="Edit distance by pathway length", xlabel="d_eff, 64 samples", ylabel="D_path, share of symbols")
    axes[3].set(title="Test error", xlabel="d_eff, 64 samples", ylabel="squared test error / variance of targets")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), frameon=False, fontsize=9)
    count = found["draw"]["d_path ~ d_eff"]["n"]
    figure.suptitle(
        f"Against effective dimension: {EXPERTS} ReLU experts behind random frozen routers, {SAMPLES} samples of "
        f"Gaussian clusters\n{count} models a family, by what varies; below each, Spearman with 95% interval"
    )
    save(figure, path)


def _short(part: dict[str, float]) -> str:
    if np.isnan(part["value"]):
        return "no value"
    return f"{part['value']:+.2f} ({part['low']:+.2f} to {part['high']:+.2f})"


@reports_errors(SettingsError)
def main(arguments: list[str] | None = None) -> int:
    """Train the models, write FIGURE.png and NUMBERS.json, print the correlations; returns the exit status."""
    assert __doc__ is not None
    parser = make_parser(__doc__)
    parser.add_argument("--models", type=int, default=60, help="models per family, 5 or more (default 60)")
    parser.add_argument("--steps", type=int, default=200, help="full-batch steps of training the experts (default 200)")
    scatter_help = f"share of variance within clusters where it does not vary (default {SCATTER})"
    parser.add_argument("--scatter", type=float, default=SCATTER, help=scatter_help)
    default = Path(__file__).parent / "results" / "theory_toy"
    parser.add_argument("--output", type=Path, default=default, help=f"without suffix (default {default})")
    options = parser.parse_args(arguments)
    if options.models < 5 or options.steps < 1:
        parser.error(f"--models is {options.models} and --steps {options.steps}: at least 5 models and 1 step")
    if not 0 < options.scatter <= 1:
        parser.error(f"--scatter is {options.scatter}: a share above 0 and up to 1")
    terminal, threads = Terminal(), torch.get_num_threads()
    torch.set_num_threads(1)  # the models are small, and results must not depend on the number of cores
    started = time.perf_counter()
    try:
        rows = plan(options.models, options.scatter)
        models = []
        for number, row in enumerate(rows):
            terminal.preparing("training models", number, len(rows))
            models.append(run_model(**row, steps=options.steps))
    finally:
        torch.set_num_threads(threads)
    found = correlations(models)
    conclusions = conclusion(found)
    command = ["python", "tools/theory_toy.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = {
        "what": "pathway edit distance against effective dimension, one-layer ReLU mixture, random frozen routers",
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{processor()}, 1 thread",
        "command": " ".join(command),
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__},
        "choices": __doc__[__doc__.index("What the paper leaves open") :].strip(),
        "settings": {"models_a_family": options.models, "steps": options.steps, "learning_rate": LEARNING_RATE},
        "conclusion": conclusions,
        "correlations": found,
        "models": [asdict(model) for model in models],
    }
    write_json(options.output.with_suffix(".json"), _rounded(result))
    draw_figure(models, found, options.output.with_suffix(".png"))
    lines = []
    for pair in PAIRS:
        lines.append([pair, *(_short(found[group][pair]["spearman"]) for group in found)])
        controlled = (found[group][pair]["spearman_without_entropy"] for group in found)
        lines.append(["  entropy removed", *map(_short, controlled)])
    terminal.table("Spearman correlation (95% interval) over models", ["", *found], lines)
    for name, sentence in conclusions.items():
        terminal.note(f"{name}: {sentence}")
    return 0


def _rounded(value: Any) -> Any:
    """Six significant digits in nested values, and None for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    if isinstance(value, float):
        return None if np.isnan(value) else float(f"{value:.6g}")
    return value


if __name__ == "__main__":
    sys.exit(main())
