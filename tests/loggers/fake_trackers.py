"""Stand-ins for the packages wandb, mlflow and trackio that keep in memory what accelerate's trackers give them.

Each behaves as the package was found to: how runs are found again, which names and settings are refused.
"""

import itertools
import re
import sys
from types import ModuleType, SimpleNamespace


class Run:
    """A run at a tracker, with all that it got."""

    def __init__(self, id_, name, project):
        self.id, self.name, self.project = id_, name, project
        self.points, self.settings, self.images, self.files = [], {}, {}, {}
        self.starts, self.ends = 1, 0

    def keep(self, values, step):
        for name, value in values.items():
            if isinstance(value, tuple):
                kind, content = value
                getattr(self, kind)[name] = content
            else:
                self.points.append((name, step, value))

    def end(self):
        self.ends += 1


class Service:
    """The runs of a tracker, by what finds them again."""

    def __init__(self):
        self.runs, self.numbers = {}, itertools.count(1)

    def open(self, known, name, project):
        if known in self.runs:
            self.runs[known].starts += 1
        else:
            known = known or f"id{next(self.numbers)}"
            self.runs[known] = Run(known, name, project)
        return self.runs[known]


def fake_wandb(service):
    wandb = ModuleType("wandb")
    wandb.Image = lambda pixels: ("images", pixels)
    wandb.Html = lambda text, inject: ("files", text)

    def init(project, name, dir, group, id, resume):
        assert resume == "allow"
        run = service.open(id, name, project)
        wandb.config = SimpleNamespace(update=lambda values, allow_val_change: run.settings.update(values))
        return SimpleNamespace(id=run.id, log=lambda values, step=None: log(run, dict(values), step),
                               define_metric=lambda name, step_metric: None, finish=run.end)  # fmt: skip

    def log(run, values, step):
        assert step is None  # W&B drops points of earlier steps
        step = values.pop("step", None)
        run.keep(values, step)

    wandb.init = init
    return wandb


def fake_mlflow(service):
    mlflow = ModuleType("mlflow")
    active = []

    def start_run(run_id, experiment_id, run_name, nested, tags, description):
        if run_id is not None and run_id not in service.runs:
            raise RuntimeError(f"Run '{run_id}' not found")
        active.append(service.open(run_id, run_name, experiment_id))
        return SimpleNamespace(info=SimpleNamespace(run_id=active[-1].id))

    def log_params(values):
        assert len(values) <= 100
        for name, value in values.items():
            if active[-1].settings.get(name, str(value)) != str(value):
                raise RuntimeError(f"Changing param values is not allowed: {name}")
        active[-1].settings |= {name: str(value) for name, value in values.items()}

    def log_metrics(values, step):
        for name in values:  # one such name refuses the batch
            path = re.fullmatch(r"[\w. /-]+", name, re.ASCII) and not re.search(r"(^|/)(\.{0,2})(/|$)", name)
            if not path or len(name) > 250:
                raise RuntimeError(f"Invalid metric name: {name!r}")
        active[-1].points += [(name, step, value) for name, value in values.items()]

    def log_artifact(local_path, artifact_path):
        with open(local_path, encoding="utf-8") as file:
            active[-1].files[local_path.rpartition("/")[2]] = file.read()

    def end_run():
        active.pop().ends += 1

    mlflow.search_experiments = lambda filter_string: []
    mlflow.create_experiment = lambda name, artifact_location, tags: name
    mlflow.get_run = lambda run_id: SimpleNamespace(data=SimpleNamespace(params=service.runs[run_id].settings))
    mlflow.log_image = lambda pixels, artifact_file: active[-1].images.update({artifact_file: pixels})
    mlflow.start_run, mlflow.log_params, mlflow.log_metrics = start_run, log_params, log_metrics
    mlflow.log_artifact, mlflow.end_run = log_artifact, end_run
    mlflow.utils = SimpleNamespace(validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100))
    return mlflow


def fake_trackio(service):
    trackio = ModuleType("trackio")
    trackio.Image = lambda pixels: ("images", pixels)

    def init(project, name, group, resume):
        if resume == "must" and name not in service.runs:
            raise ValueError(f"Run '{name}' does not exist in project '{project}'")
        assert resume == "must" or name not in service.runs
        run = service.open(name, name, project)
        trackio.config = run.settings
        return SimpleNamespace(
            name=name,
            log=run.keep,
            log_artifact=lambda path, name, type: run.files.update({name: path.read_text()}),
            finish=run.end,
        )

    trackio.init = init
    return trackio


def put(monkeypatch):
    """Put the stand-ins in the place of the packages; returns their services by name."""
    services = {}
    for make in (fake_wandb, fake_mlflow, fake_trackio):
        module = make(service := Service())
        monkeypatch.setitem(sys.modules, module.__name__, module)
        services[module.__name__] = service
    return services
