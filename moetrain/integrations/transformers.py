"""`MonitorCallback`: the monitor in transformers' `Trainer`, or in one that follows it, such as TRL's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from moetrain.distributed.mesh import ParallelLayout, make_mesh
from moetrain.integrations.families import FamilyError, find_routers
from moetrain.integrations.options import MonitorOptions
from moetrain.integrations.row_panel import NEVER
from moetrain.integrations.rows import (
    MonitorError,
    Rows,
    column_names,
    domains_of,
    number_domains,
    read_rows,
    reading_order,
)
from moetrain.integrations.watched_run import WatchedRun

__all__ = ["FamilyError", "MonitorCallback", "MonitorError"]


class MonitorCallback(TrainerCallback):
    """Watches which domain of a mixture-of-experts model's data is memorized and which generalizes.

        trainer = Trainer(..., callbacks=[MonitorCallback("source", train, held_out, output_dir="monitor")])

    Training is not changed: the same weights, the same random numbers. Readings, TensorBoard files, ``events.jsonl``,
    ``summary.json`` and ``report.html`` are written to ``output_dir``, in the form of a run of moetrain. With each of
    Trainer's checkpoints the monitor's state is saved there, and a resumed training goes on from it.

    Several processes may train replicas of the model (DDP): each records its own samples, the main one reads the panel.

    Args:
        domain_column: column of the data sets that names a row's domain.
        train_dataset: what is trained on, with that column. Trainer removes columns that the model does not take; only
            with ``remove_unused_columns=False`` this may be left out. Rows as Trainer's, in the same order; they may
            still be text where Trainer (as TRL's) tokenizes them one by one.
        eval_dataset: tokenized rows of the same domains that are not trained on; or several such data sets by name.
            Without any, a domain is judged by rows that the run first meets in its last tenth, if its order is known.
        output_dir: folder of the results. Nothing in it is overwritten: another run goes to ``output_dir-2``.
        samples: panel samples of a domain and cell; of samples to come a quarter where enough are held out.
        tokens: first tokens of a row that are read and compared; shorter rows are left out.
        readings: of the panel, evenly spaced, the first before training.
        every: steps between streaming metrics.
        window: newest samples of a domain that streaming metrics are computed from.
        tau: share of the routing weight that a pathway covers.
        batch_rows: rows of a forward pass of the panel; default: Trainer's per-device batch size for evaluation.
        report: whether to write ``report.html`` at the end; needs moetrain[report].

    Raises (when training begins):
        MonitorError: the data, or the way of training, cannot be watched; one line with the remedy.
        FamilyError: the model has no routers, or those of a family that has no row in `moetrain.integrations.families`.
    """

    def __init__(
        self,
        domain_column: str,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        output_dir: str | Path = "monitor",
        *,
        samples: int = 64,
        tokens: int = 40,
        readings: int = 11,
        every: int = 10,
        window: int = 64,
        tau: float = 0.7,
        batch_rows: int | None = None,
        report: bool = True,
    ) -> None:
        self._column, self._train, self._eval = domain_column, train_dataset, eval_dataset
        self._options = MonitorOptions(
            output_dir=str(output_dir),
            samples=samples,
            tokens=tokens,
            readings=readings,
            every=every,
            window=window,
            tau=tau,
            batch_rows=batch_rows,
            report=report,
        )
        self._options.settings(["domain"])  # a value out of range is told now
        self.run: WatchedRun | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model, dataloader = kwargs["model"], kwargs["train_dataloader"]
        if self.run is not None:  # a training that failed
            self.run.close()
        find_routers(model)
        _check_replicas(args, model)
        mesh = make_mesh("none", args.world_size, 1, args.device) if args.world_size > 1 else None
        layout = ParallelLayout(args.process_index, args.world_size, device=args.device, mesh=mesh)
        train, names = self._training_rows(dataloader.dataset)
        first_step = None
        if (order := reading_order(dataloader)) is not None and np.array_equal(np.sort(order), np.arange(len(train))):
            rows_per_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
            first_step = train.first_steps(order, rows_per_step, state.max_steps, NEVER)
        options = self._options
        if options.batch_rows is None:
            options = replace(options, batch_rows=args.per_device_eval_batch_size)
        self.run = WatchedRun(
            options, model, layout, list(names.values()), train, self._heldout_rows(names), first_step, state.max_steps
        )
        try:
            self.run.begin(state.global_step)
        except BaseException:
            self.run.close()
            self.run = None
            raise

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self.run.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.run is not None and logs and "loss" in logs:
            self.run.log(state.global_step, logs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self.run.save(state.global_step, args.save_total_limit)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run is not None:
            self.run.finish(state.global_step)
            self.run = None

    def _training_rows(self, dataset: Any) -> tuple[Rows, dict[str, str]]:
        """The rows that are trained on, and the domains' names by value of the column."""
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise MonitorError(
                "the training data is a stream, whose rows cannot be drawn from: load it with streaming=False"
            )
        given = dataset if self._train is None else self._train
        values = domains_of(given, self._column, "the training data" if self._train is None else "train_dataset")
        if len(values) != len(dataset):
            raise MonitorError(
                f"train_dataset has {len(values)} rows, but Trainer trains on {len(dataset)}, so a row's domain is not "
                "known: pack or filter the rows of each domain apart, keep the column, and give Trainer the result"
            )
        names = number_domains(values)
        numbers = {value: number for number, value in enumerate(names)}
        rows = read_rows(dataset, _numbers(values, numbers), self._options.tokens, "the training data")
        if given is not dataset and "input_ids" in column_names(given):
            rows.check_same(given)
        return rows, names

    def _heldout_rows(self, names: dict[str, str]) -> Rows | None:
        """The rows of all evaluation data sets."""
        if self._eval is None:
            return None
        parts = []
        numbers = {value: number for number, value in enumerate(names)}
        datasets = self._eval if isinstance(self._eval, dict) else {"eval_dataset": self._eval}
        for name, dataset in datasets.items():
            what = name if name == "eval_dataset" else f"eval_dataset {name!r}"
            values = domains_of(dataset, self._column, what)
            if unknown := sorted(set(values) - set(numbers)):
                raise MonitorError(
                    f"{what}: {self._column} {unknown[0]!r} is no domain of the training data ({', '.join(numbers)}): "
                    "rename it, or leave its rows out"
                )
            parts.append(read_rows(dataset, _numbers(values, numbers), self._options.tokens, what))
        return Rows.join(parts)


def _numbers(values: list[str], numbers: dict[str, int]) -> np.ndarray:
    return np.array([numbers[value] for value in values], np.int64)


def _check_replicas(args: Any, model: nn.Module) -> None:
    """Raise MonitorError where no process has the whole model."""
    if args.n_gpu > 1:
        raise MonitorError(
            "one process trains on several GPUs (DataParallel): start one for each, torchrun --nproc_per_node N, or "
            "set CUDA_VISIBLE_DEVICES to one"
        )
    if any(isinstance(each, DTensor) or hasattr(each, "ds_id") for each in model.parameters()) or getattr(
        args, "fsdp", None
    ):
        raise MonitorError(
            "the model is sharded (FSDP, DeepSpeed ZeRO-3 or tensor parallel), so that no process can read the panel "
            "by itself: train with DDP, or replay the saved checkpoints with tools/replay.py"
        )
