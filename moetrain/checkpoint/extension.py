"""A run that goes on from another run's checkpoint with more steps or other data: its settings, and its folder.

It is a run of its own: the other stays as it is. Its folder begins as a copy of what the other had at the checkpoint,
so its curves and readings are whole. What the first steps were trained on is part of its settings (``data.earlier``):
the stream stays a function of settings and step.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moetrain.atomic_io import PARTIAL, write_file
from moetrain.checkpoint.manager import checkpoint_folder, list_checkpoints, load_checkpoint
from moetrain.checkpoint.manifest import RECORD, CheckpointError, Manifest
from moetrain.config import DataSettings, EarlierStage, Settings, SettingsError, expand, load_settings
from moetrain.data.corpus import Corpus
from moetrain.data.tokenizer import tokenizer_file
from moetrain.optim.schedule import learning_rate, rate_after_jump

MAY_CHANGE = (
    "train.max_steps",
    "train.log_every",
    "train.eval_every",
    "train.checkpoint_every",
    "optim.learning_rate",
    "optim.min_learning_rate_ratio",
    "optim.schedule",
    "optim.decay_share",
    "panel.readings",
    "probes.readings",
    "data.mixture",
    "data.phases",
)
"""Settings in which a run may differ from the one that it goes on from, beside added domains and weights."""


def named_checkpoint(settings: Settings) -> Path | None:
    """The checkpoint that ``train.resume`` names; None for ``auto`` and ``never``."""
    resume = settings.train.resume
    return None if resume in ("auto", "never") else Path(expand(resume, "train.resume"))


def run_of(checkpoint: Path) -> Path:
    """The folder of a checkpoint's run.

    Raises:
        SettingsError: it is in no run.
    """
    run = checkpoint.resolve().parent.parent
    if not (run / "config.yaml").is_file():
        raise SettingsError(
            f"train.resume: {checkpoint} is in no run: give auto, never or RUN/checkpoints/step_XXXXXXXX"
        )
    return run


def extended_settings(settings: Settings, may_differ: Collection[str]) -> Settings:
    """The settings of a run that goes on with more steps or other data; those of any other run unchanged.

    Args:
        may_differ: settings in which a run that is merely resumed may differ.

    Raises:
        SettingsError: something else differs, or the run is finished and nothing does.
        CheckpointError: ``train.resume`` names no checkpoint, or one of an earlier version.
    """
    checkpoint = named_checkpoint(settings)
    if checkpoint is None:
        return settings
    run = run_of(checkpoint)
    saved = load_settings(run / "config.yaml")
    model = saved.tokenizer.model
    if model is not None and not Path(expand(model, "tokenizer.model")).exists():  # with a run that was deleted
        raise SettingsError(
            f"train.resume: the tokenizer of {run} is not at {model} any more: copy {tokenizer_file(run)} to that place"
        )
    if saved.data.earlier and settings.tokenizer.model is None:
        settings = _with_tokenizer(settings, model)  # an earlier extension has set it
    before, after = saved.by_key(), settings.by_key()
    free = {*may_differ, "data.earlier"}
    different = {key for key in before.keys() | after.keys() if key not in free and before.get(key) != after.get(key)}
    if not different:
        if (run / "summary.json").exists():
            raise SettingsError(finished(run, checkpoint))
        return _with_data(settings, saved.data.earlier, saved)
    _check_changes(different, before, saved, run)
    step = Manifest.read(checkpoint, ()).step
    record = _record(checkpoint)
    if "planned_steps" not in record:
        raise CheckpointError(
            f"{checkpoint}: an earlier version wrote it, which noted too little for that: go on from its weights by "
            f"python tools/export_hf.py {checkpoint} exported, then train.resume=never model.initialize_from=exported "
            "tokenizer.model=exported/tokenizer.json"
        )
    weighed = saved.data.mixture == "weights"
    begin = _begin(saved)
    if step <= begin:  # the copy that the run began with
        raise SettingsError(
            f"train.resume: {checkpoint} is a copy of the checkpoint that {run} went on from: set "
            f"train.resume={saved.train.resume}, or give a later checkpoint of {run}"
        )
    stage = EarlierStage(
        steps=step,
        planned=record["planned_steps"],
        domains=list(saved.data.domains),
        mixture=saved.data.mixture,
        weights={name: domain.weight or 0.0 for name, domain in saved.data.domains.items()} if weighed else {},
        phases=saved.data.phases,
        stops=[stop for stop in record["stops"] if stop[0] > begin],
    )
    extended = _with_data(settings, [*saved.data.earlier, stage], saved)
    if extended.data.domains.keys() != saved.data.domains.keys() and settings.tokenizer.model is None:
        # One that was trained on the run's data would be trained anew on more data.
        extended = _with_tokenizer(extended, str(tokenizer_file(run)))
    return extended


def finished(run: Path, checkpoint: Path) -> str:
    """Error message for a finished run that is resumed with its own settings."""
    return (
        f"train.resume: {run} is finished: to go on from {checkpoint.name}, set a larger train.max_steps, null for the "
        "whole stream, or add domains"
    )


def goes_on_from(settings: Settings) -> Path | None:
    """The checkpoint that a run of `extended_settings` goes on from as a run of its own; None for any other run."""
    checkpoint = named_checkpoint(settings)
    if checkpoint is None:
        return None
    saved = load_settings(run_of(checkpoint) / "config.yaml")
    return checkpoint if saved.data.earlier != settings.data.earlier else None


def check_extension(settings: Settings, corpus: Corpus, steps: int) -> str | None:
    """Check that a run can go on from the checkpoint that it names, once its data are there.

    Args:
        steps: steps of the run, those of the checkpoint included.

    Returns:
        A line for the user where the learning rate drops at once; else None.

    Raises:
        CheckpointError: the checkpoint was trained on other data or another tokenizer.
        SettingsError: no step is left, or the learning rate would jump up.
    """
    checkpoint = goes_on_from(settings)
    if checkpoint is None:
        return None
    record, begin = _record(checkpoint), settings.data.earlier[-1].steps
    if problem := changed_data(record, corpus, settings):
        raise CheckpointError(f"train.resume: {checkpoint} was trained with {problem}")
    if steps <= begin:
        most = settings.train.max_steps
        if most is not None and most <= begin:
            raise SettingsError(
                f"train.max_steps={most}: {checkpoint.name} has trained {begin} steps: set a number above that, or "
                "null for the whole stream"
            )
        exhausted = " or the weights let none go on" if settings.data.mixture == "weights" else ""
        raise SettingsError(
            f"train.resume: {checkpoint} has trained on all of its stream{exhausted}: add text as a new domain, "
            "data.domains.NAME"
        )
    before, now = record["learning_rate"], learning_rate(begin, steps, settings.optim)
    after = learning_rate(begin + 1, steps, settings.optim)
    if not math.isclose(now, before, rel_tol=1e-6) and after > before * (1 + 1e-6):
        stable = _stable_checkpoints(run_of(checkpoint))
        other = f", or train.resume={stable[-1]}, where the rate was at its peak" if stable else ""
        raise SettingsError(
            f"optim.schedule={settings.optim.schedule}: the learning rate would jump from {before:g} to {after:g} at "
            f"step {begin + 1}: set optim.schedule=wsd optim.learning_rate={before:g}{other}"
        )
    if rate_after_jump(before, begin, steps, settings.optim) is None:
        return None
    return (
        f"optim.schedule={settings.optim.schedule}: the learning rate drops from {before:g} to {after:g} at step "
        f"{begin + 1}, where the run goes on: to keep it, set optim.schedule=constant optim.learning_rate={before:g}"
    )


def changed_data(record: Mapping[str, Any], corpus: Corpus, settings: Settings) -> str | None:
    """What a checkpoint's run was trained with that is not in a corpus unchanged, and the remedy; None where all is."""
    if record["tokenizer"] != corpus.tokenizer.fingerprint:
        if settings.tokenizer.model is None:  # it was trained on the documents
            return "other documents of its domains: restore their files, and give new text as a domain of its own"
        return f"another tokenizer: put the one of its run's folder in the place of {settings.tokenizer.model}"
    now = {domain.name: domain.digest for domain in corpus.domains}
    for name, digest in record["documents"].items():
        if now.get(name) != digest:
            return (
                f"other documents of data.domains.{name}: restore its files and settings, and give new text as a "
                "domain of its own"
            )
    return None


def start_folder(place: Path, checkpoint: Path, settings: Settings) -> None:
    """Make the folder of a run that goes on from a checkpoint: what its run had written by then, and the checkpoint.

    Raises:
        CheckpointError: the checkpoint is corrupt, or a file of its run is missing.
        OSError: the folder cannot be written.
    """
    loaded, run = load_checkpoint(checkpoint), run_of(checkpoint)
    partial = place.with_name(place.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    own = checkpoint_folder(partial, loaded.step)
    own.mkdir(parents=True)
    fixed = {run / name: partial / name for name in loaded.record["pieces"]}
    fixed |= {path: own / path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file()}
    for path, copy in {**fixed, **{run / name: partial / name for name in loaded.run_files}}.items():
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, and {checkpoint} lists it: go on from a complete copy of the run")
        copy.parent.mkdir(exist_ok=True)
        if path in fixed:
            _link(path, copy)
        else:
            shutil.copyfile(path, copy)  # it will grow; what is later than the checkpoint is cut off as on resuming
    write_file(partial / "config.yaml", settings.to_yaml())
    partial.rename(place)


def _link(path: Path, copy: Path) -> None:
    """A second name of a file that does not change any more, or a copy where there can be none."""
    try:
        os.link(path, copy)
    except OSError:
        shutil.copyfile(path, copy)


def _stable_checkpoints(run: Path) -> list[Path]:
    """The kept checkpoints of a run's own steps at which the rate was at its peak, oldest first."""
    saved = load_settings(run / "config.yaml")
    own = [each for each in list_checkpoints(run) if Manifest.read(each, ()).step > _begin(saved)]
    peak = saved.optim.learning_rate
    return [each for each in own if math.isclose(_record(each).get("learning_rate", 0.0), peak)]


def _begin(settings: Settings) -> int:
    """The step that a run went on from another run at; 0 where it did not."""
    return settings.data.earlier[-1].steps if settings.data.earlier else 0


def _with_tokenizer(settings: Settings, model: str | None) -> Settings:
    return settings.model_copy(update={"tokenizer": settings.tokenizer.model_copy(update={"model": model})})


def _with_data(settings: Settings, earlier: list[EarlierStage], saved: Settings) -> Settings:
    """Settings with these stages, and with the domains of the other run first, as their numbers must stay."""
    domains = settings.data.domains
    ordered = {name: domains[name] for name in [*saved.data.domains, *domains] if name in domains}
    tree = settings.data.model_dump() | {"domains": ordered, "earlier": earlier}
    return settings.model_copy(update={"data": DataSettings.model_validate(tree)})


def _check_changes(different: set[str], before: Mapping[str, Any], saved: Settings, run: Path) -> None:
    """Raise SettingsError for a difference that a run cannot go on with."""
    for key in sorted(different):
        _, _, rest = key.partition("data.domains.")
        name, _, setting = rest.partition(".")
        if key in MAY_CHANGE or (rest and (setting == "weight" or name not in saved.data.domains)):
            continue
        if key in before:
            remedy = f"set {key}={json.dumps(before[key], ensure_ascii=False)} as in {run / 'config.yaml'}"
        else:
            remedy = f"leave it out, as {run / 'config.yaml'} does"
        raise SettingsError(
            f"train.resume: {run} was run with another {key}, and only steps, schedule, weights and added domains may "
            f"change: {remedy}, or start a new run with train.resume=never"
        )


def _record(checkpoint: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint / RECORD}: cannot be read ({error}): give another checkpoint") from None
    return found
