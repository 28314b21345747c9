"""Every setting of a run: typed, documented, and checked when it is loaded."""

from moetrain.config.data import DataSettings, DomainSettings, EarlierStage, MixturePhase, TokenizerSettings
from moetrain.config.facts import FactSettings
from moetrain.config.loading import Settings, SettingsError, describe_settings, expand, flatten, load_settings
from moetrain.config.monitoring import MonitorSettings, PanelSettings, PhaseSettings, ProbeSettings, ProfileSettings
from moetrain.config.training import GuardSettings, ModelSettings, OptimSettings, RunSettings, TrainSettings
from moetrain.config.unused import unused_settings

__all__ = [
    "DataSettings",
    "DomainSettings",
    "EarlierStage",
    "FactSettings",
    "GuardSettings",
    "MixturePhase",
    "ModelSettings",
    "MonitorSettings",
    "OptimSettings",
    "PanelSettings",
    "PhaseSettings",
    "ProbeSettings",
    "ProfileSettings",
    "RunSettings",
    "Settings",
    "SettingsError",
    "TokenizerSettings",
    "TrainSettings",
    "describe_settings",
    "expand",
    "flatten",
    "load_settings",
    "unused_settings",
]
