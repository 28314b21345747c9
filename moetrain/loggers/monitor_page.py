"""TensorBoard's custom-scalars page ``Grokking monitor``: which charts it has, and what shows that a chart has data."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.plugins.custom_scalar import layout_pb2, metadata

from moetrain.metrics import table

VERDICT, PAGE = "Verdict", "Grokking monitor"
FIRST_GROUP = VERDICT
"""The group of tags that TensorBoard opens on: it sorts them by name, capitals first. Its curves are copies."""


@dataclass(frozen=True)
class Chart:
    """The tags of a chart, and whether TensorBoard may smooth its curves."""

    tags: tuple[str, ...]
    smoothed: bool = True


def monitor_charts(domains: Sequence[str], tasks: Sequence[str] = (), trained_tasks: Sequence[str] = ()) -> Pages:
    """The charts of a run by page and title: the verdict, a chart per domain, as the curves of a run have one color;
    then losses, routing and controls of all domains, and probes.

    Args:
        domains: names of the domains.
        tasks: names of the probe tasks.
        trained_tasks: those of them that ask for trained facts.
    """
    verdict: dict[str, Chart] = {}
    charts: dict[str, Chart] = {}
    for title, shown in table.charts().items():
        smoothed = not any(metric.categories for _, metric in shown)
        if all(metric.verdict for _, metric in shown):
            verdict |= {
                f"{domain}: {title}": Chart(tuple(f"{tag}/{domain}" for tag, _ in shown), smoothed)
                for domain in domains
            }
            continue
        tags = [
            f"{tag}/{domain}" if metric.per_domain else tag
            for tag, metric in shown
            for domain in (domains if metric.per_domain else domains[:1])
        ]
        charts[title] = Chart(tuple(tags), smoothed)
    heldout = [task for task in tasks if task not in trained_tasks]
    for metric in table.probe_metrics():
        if metric.chart and heldout:
            charts[metric.chart] = Chart(tuple(f"probe/{task}/{metric.name}" for task in heldout))
    if trained_tasks:
        charts["probes of trained facts: accuracy"] = Chart(tuple(f"probe/{task}/accuracy" for task in trained_tasks))
    return {VERDICT: verdict, PAGE: charts}


Pages = Mapping[str, Mapping[str, Chart]]
"""Charts by page and title."""


def layout_summary(pages: Pages) -> Summary:
    """Pages of charts as the custom-scalars plugin reads them. It takes the newest of a run.

    The plugin smooths every chart but those with a margin; so one that must not be smoothed gets a margin of width 0.
    """
    layout = layout_pb2.Layout()
    for page, charts in pages.items():
        category = layout.category.add(title=page)
        for title, chart in charts.items():
            tags = dict.fromkeys(chart.tags)
            shown = category.chart.add(title=title)
            if chart.smoothed:
                shown.multiline.tag.extend(f"^{re.escape(tag)}$" for tag in tags)  # the plugin takes patterns
            else:
                for tag in tags:
                    shown.margin.series.add(value=tag, lower=tag, upper=tag)
    plugin = SummaryMetadata.PluginData(plugin_name=metadata.PLUGIN_NAME)
    value = Summary.Value(
        tag=metadata.CONFIG_SUMMARY_TAG,
        metadata=SummaryMetadata(plugin_data=plugin),
        tensor=TensorProto(dtype="DT_STRING", string_val=[layout.SerializeToString()]),
    )
    return Summary(value=[value])


def charts_laid_out(files: Sequence[Path]) -> set[str]:
    """Titles of the charts of the newest layout in some TensorBoard files, in order of time; empty without one."""
    name, titles = metadata.CONFIG_SUMMARY_TAG.encode(), set[str]()
    for path in files:
        content, start = path.read_bytes(), 0
        # A record: its length, 8 bytes; a checksum, 4 bytes; the event; a checksum, 4 bytes.
        while start + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            record = content[start + 12 : start + 12 + length]
            if name in record:
                (value,) = Event.FromString(record).summary.value
                layout = layout_pb2.Layout.FromString(value.tensor.string_val[0])
                titles = {chart.title for page in layout.category for chart in page.chart}
            start += length + 16
    return titles
