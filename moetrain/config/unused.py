"""Settings that were changed and have no effect beside the others.

They are no error: one configuration may serve several runs, such as one with another schedule, or a dense twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

from moetrain.config.data import DomainSettings
from moetrain.config.loading import Settings, flatten


class _Rule(NamedTuple):
    keys: tuple[str, ...]  # dotted; * stands for any characters
    unused: Callable[[Settings], bool]
    why: str


_ROUTER = (
    "model.num_experts",
    "model.norm_topk_prob",
    "model.balancing",
    "model.balance_scope",
    "model.router_*_coef",
    "model.bias_update_rate",
    "guard.dead_steps",
)
_ROUTING = (
    "panel.*",
    "phase.*",
    "monitor.window",
    "monitor.store_top",
    "monitor.tau",
    "data.domains.*.panel_tokens",
    "data.domains.*.eps",
)
_PROBES = (
    "probes.items",
    "probes.trained_items",
    "probes.readings",
    "probes.contaminated",
    "probes.generate",
    "probes.max_new_tokens",
    "probes.embeddings",
)


def _has_probes(settings: Settings) -> bool:
    generated = any(domain.builtin and not domain.shuffled for domain in settings.data.domains.values())
    return bool(settings.probes.tasks) or (settings.probes.builtin and generated)


_RULES = (
    _Rule(
        (*_ROUTING, "monitor.every", "monitor.exposure_window", "monitor.weights"),
        lambda s: not s.monitor.enabled,
        "with monitor.enabled=false",
    ),
    _Rule(_ROUTING, lambda s: not s.watches_routing, "with model.experts=dense and without model.dense_experts"),
    _Rule(_ROUTER, lambda s: s.model.experts == "dense", "with model.experts=dense, which has no router"),
    _Rule(("model.dense_experts",), lambda s: s.model.experts != "dense", "without model.experts=dense"),
    _Rule(
        ("model.router_aux_loss_coef",),
        lambda s: s.model.balancing != "aux" and s.model.router_aux_loss_coef > 0,
        "without model.balancing=aux",
    ),
    _Rule(("model.bias_update_rate",), lambda s: s.model.balancing != "bias", "without model.balancing=bias"),
    _Rule(("model.balance_scope",), lambda s: s.model.balancing == "none", "with model.balancing=none"),
    _Rule(("model.initializer_range",), lambda s: s.model.initialize_from is not None, "with model.initialize_from"),
    _Rule(("optim.momentum",), lambda s: s.optim.name != "muon", "without optim.name=muon"),
    _Rule(("optim.decay_share",), lambda s: s.optim.schedule != "wsd", "without optim.schedule=wsd"),
    _Rule(
        ("optim.min_learning_rate_ratio",),
        lambda s: s.optim.schedule == "constant",
        "with optim.schedule=constant",
    ),
    _Rule(
        ("tokenizer.vocab_size", "tokenizer.sample_bytes"),
        lambda s: s.tokenizer.model is not None,
        "with tokenizer.model, of which no more is trained",
    ),
    _Rule(("tokenizer.lossy",), lambda s: s.tokenizer.model is None, "without tokenizer.model"),
    _Rule(
        ("data.least_worth",),
        lambda s: all(domain.repeats != "auto" for domain in s.data.domains.values()),
        "without data.domains.NAME.repeats=auto",
    ),
    _Rule(
        ("panel.repeat_every",),
        lambda s: s.panel.repeat_every > 0 and all(domain.copies == 1 for domain in s.data.domains.values()),
        "without data.domains.NAME.repeats",
    ),
    _Rule(
        ("panel.readings", "probes.readings"),
        lambda s: s.monitor.budget == "auto",
        "with monitor.budget=auto, which chooses the number",
    ),
    _Rule(_PROBES, lambda s: not _has_probes(s), "without probes.tasks, or probes of a built-in domain"),
    _Rule(("probes.trained_items",), lambda s: not s.probes.builtin, "with probes.builtin=false"),
    _Rule(("probes.max_new_tokens",), lambda s: not s.probes.generate, "without probes.generate=true"),
    _Rule(("profile.steps",), lambda s: s.profile.start is None, "without profile.start"),
)


def unused_settings(settings: Settings) -> Iterator[str]:
    """Lines about settings that are not the default and have no effect beside the others, with what they would need."""
    changed = _changed(settings)
    for rule in _RULES:
        if not rule.unused(settings):
            continue
        found = [key for key in changed if any(fnmatchcase(key, pattern) for pattern in rule.keys)]
        if found:
            yield f"{', '.join(found)}: no effect {rule.why}"
            changed = [key for key in changed if key not in found]
    for name, domain in settings.data.domains.items():
        for key, unused, why in (
            ("most_repeats", domain.repeats != "auto", f"without data.domains.{name}.repeats=auto"),
            ("text_field", domain.builtin is not None, "on a built-in domain, which has no fields"),
        ):
            if unused and getattr(domain, key) != DomainSettings.model_fields[key].default:
                yield f"data.domains.{name}.{key}: no effect {why}"


def _changed(settings: Settings) -> list[str]:
    """The dotted keys that are not the default, of domains too."""
    defaults = flatten(Settings().model_dump())
    of_domains = {key: field.default for key, field in DomainSettings.model_fields.items()}
    found = []
    for key, value in flatten(settings.model_dump()).items():
        _, _, rest = key.partition("data.domains.")
        default = of_domains.get(rest.partition(".")[2]) if rest else defaults.get(key)
        if value != default:
            found.append(key)
    return found
