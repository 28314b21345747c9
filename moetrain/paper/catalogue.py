"""What the paper's figures and tables hold, and what ours need and do differently."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One figure or table.

    Attributes:
        name: on the command line.
        content: what the paper shows there.
        needs: what it is computed on.
        differs: what differs from the paper, and why; or what the published text leaves open.
        options: on the command line, beside RUN.
    """

    name: str
    content: str
    needs: str
    differs: str
    options: str = ""

    @property
    def command(self) -> str:
        words = ["python tools/paper.py", self.name, *([] if self.name == "figure8" else ["RUN"]), self.options]
        return " ".join(word for word in words if word)


_RUN = "a run, or a replay of its checkpoints or of OLMoE's"
_GROUPS = "Groups are the two earliest of 8 samples or more in each domain; the paper shows two steps for all domains."
_CONTROLS = (
    "Added: held-out samples, and samples trained on that were not memorized; slopes with intervals over samples."
)
_EPS = "eps is by the paper's rule (a fifth of the samples memorized); its values for OLMoE are not published."

ENTRIES = (
    Entry(
        "figure1",
        "Samples memorized by each checkpoint, by onset, and benchmark accuracy, by domain.",
        f"{_RUN}, with probes",
        f"{_EPS} An onset with fewer than three later readings does not count: the condition holds trivially there.",
    ),
    Entry(
        "figure2",
        "Loss of groups of training samples and accuracy of the groups of test items paired with them; delays.",
        "a finished run or replay with probes above chance",
        "Texts are embedded by the model's own hidden states unless probes.embeddings names an encoder (the paper: "
        "all-MiniLM-L6-v2). Accuracy is zero-shot; table1 gives the delays after LoRA.",
        "[--domain D]",
    ),
    Entry(
        "figure3",
        "Drawing of the two metrics.",
        _RUN,
        "Drawn on real samples: the closest and the farthest pair of a domain at the newest reading.",
        "[--domain D]",
    ),
    Entry(
        "figure4",
        "Pathway distance and loss of two memorization groups in each domain, with trends after their onset; all "
        "domains with a quadratic trend.",
        _RUN,
        f"{_GROUPS} {_CONTROLS} The trend after an onset is a line: its form is not published.",
        "[--domain D ...]",
    ),
    Entry(
        "figure5",
        "Pathway distance within each layer, of one memorization group.",
        _RUN,
        "The group is the second of the domain's early groups; the paper does not say whose domain it shows.",
        "[--domain D]",
    ),
    Entry(
        "figure6",
        "As figure 4 for pathway consistency C_i.",
        _RUN,
        f"{_GROUPS} {_CONTROLS} C_i is the median over samples whose largest cosine exceeds 0.05: its division is "
        "unsafe below. By the formula a smaller C_i is smoother.",
        "[--domain D ...]",
    ),
    Entry(
        "figure7",
        "Accuracy against each metric and loss, with fit, MSE and R².",
        f"{_RUN}, with probes",
        "Accuracy is the run's own, zero-shot. The published MSE and R² do not follow from table 1's coefficients by a "
        "line, and the form of the fit and the domain are not published; ours is a line.",
        "[--domain D]",
    ),
    Entry(
        "figure8",
        "Edit distance against effective dimension, in one-layer models with frozen random routers.",
        "nothing: it trains them",
        "Done by tools/theory_toy.py, which lists its choices: the paper gives neither training nor lambda.",
    ),
    Entry(
        "figure9",
        "Figure 4 under thresholds tau of 0.5 to 0.8, one domain.",
        _RUN,
        "The domain is the first that has groups, unless given.",
        "[--domain D] [--tau 0.5 0.6 0.7 0.8]",
    ),
    Entry(
        "figure10",
        "Figure 4 under six eps in steps of 0.1, one domain.",
        _RUN,
        "The paper's 1.5 to 2.0 belong to OLMoE's losses: ours are around the eps of the run's domain.",
        "[--domain D] [--eps E ...]",
    ),
    Entry(
        "figure11",
        "Figure 4 under delta of 0.03, 0.04 and 0.05, one domain.",
        _RUN,
        "eps is the largest of figure 10, as in the paper.",
        "[--domain D] [--delta X ...] [--eps E]",
    ),
    Entry(
        "figure12",
        "Pathway distance between samples of two domains over time.",
        f"{_RUN}, with two domains of equal sample length",
        "All pairs of domains; added: the distances within each, and slopes with intervals.",
        "[--domain D ...]",
    ),
    Entry(
        "figure13",
        "Pathway distance of pairs against their router entropy, tau = 0.8; r over all checkpoints.",
        _RUN,
        "Added: an interval over samples, and r within each reading, because readings differ in both quantities.",
        "[--domain D ...] [--pairs 141530]",
    ),
    Entry(
        "figure14",
        "Figure 4 for nanoMoE.",
        "a run of configs/nano_moe.yaml",
        "Four domains instead of OpenWebText's commonsense subset (chosen by Qwen3-8B), and far fewer tokens than 25B.",
    ),
    Entry(
        "figure15",
        "Figure 6 for nanoMoE.",
        "a run of configs/nano_moe.yaml",
        "As figure 14.",
    ),
    Entry(
        "table1",
        "Correlation of accuracy with distance, consistency and losses, by domain, after LoRA at each checkpoint.",
        "a run that kept its checkpoints, tasks, and instructions",
        "Coefficients have n, p and Fisher's interval; from 8 checkpoints on also those of first differences and of "
        "residuals on log steps, since two trends always correlate. A tenth of the items is removed by Min-K%++ of the "
        "newest checkpoint, as in the paper. LoRA's alpha and the moving average are not published: 2 x rank, 0.1.",
        "[--instructions [DOMAIN=]FILE ...] [--task FILE ...] [--readings REPLAY] [--rank 32] [--removed 0.1]",
    ),
    Entry(
        "table2",
        "Data sets: pretraining text, benchmarks and validation text of each domain.",
        "a finished run",
        "Of the run, with the numbers of its panel samples. Validation text is the held-out part of each domain.",
    ),
    Entry(
        "table3",
        "Convergence speed and stability of router, expert and attention weights, from norms of checkpoints.",
        "a run that kept four checkpoints or more",
        "Early and late are halves of the changes, since the split is not published. Intervals are over matrices.",
    ),
    Entry(
        "table4",
        "Table 1 for one domain with LoRA of rank 32 and 64.",
        "as table1",
        "As table 1; scores of rank 32 are shared with it.",
        "[--domain D] [--rank 32 64] and the options of table1",
    ),
    Entry(
        "table5",
        "Correlation of zero-shot accuracy on four commonsense tasks with the metrics, for nanoMoE.",
        "a run of configs/nano_moe.yaml, or any run with probes",
        "As table 1. Metrics are those of the task's domain, or means over domains where the run has no such domain.",
        "[--task NAME ...]",
    ),
)

UNPUBLISHED = (
    "which ten checkpoints were sampled (only their rounded steps), and the ids of the samples and of the pairs",
    "eps of each domain (only that 1.5 to 2.0 was tried on one), and the numbers of samples by group",
    "code; numbers behind figures, other than those of tables 1, 3, 4 and 5",
)
"""What cannot be had from the published text."""


def find(name: str) -> Entry | None:
    """The entry of a name; None without one."""
    return next((entry for entry in ENTRIES if entry.name == name), None)
