"""The saved view that opens MLflow's runs page on a front: an experiment tag and a link to it.

MLflow does not document the tag's format; if a later version reads it no more, the page opens
without filter and charts, and nothing else is lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_PREFIX = "mlflow.sharedViewState."


def view_tag(
    search_id: str, title: str, created: int, *, qualities: Sequence[str], costs: Sequence[str]
) -> tuple[str, str]:
    """Returns name and value of the experiment tag that stores the view of one search.

    Args:
        search_id: Value of the tag `search_id` that the runs of the search carry.
        title: Name of the view in MLflow's drop-down list.
        created: Time in milliseconds since 1970.
        qualities: Metrics that say how good a network is, what matters most first.
        costs: Metrics that say what it costs, likewise.
    """
    state = json.dumps(_state(search_id, qualities, costs))
    value = {"name": title, "createdAt": created, "state": state}
    return _PREFIX + search_id, json.dumps(value)


def view_link(server: str, experiment_id: str, search_id: str) -> str:
    """Returns the address that opens the runs page with the view of one search.

    Without `workflowType`, MLflow 3 opens its pages for language models, which show no runs.
    """
    return (
        f"{server}/#/experiments/{experiment_id}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={search_id}&compareRunsMode=CHART"
    )


def front_link(server: str, experiment_id: str, run_id: str) -> str:
    """Returns the address of the interactive front among the artifacts of a parent run."""
    return (
        f"{server}/#/experiments/{experiment_id}/runs/{run_id}/artifacts/pareto/front.html"
        f"?workflowType=machine_learning"
    )


def _state(search_id: str, qualities: Sequence[str], costs: Sequence[str]) -> dict[str, Any]:
    """Returns the runs page's state: the front's runs by MACs, and charts of them."""
    section = "pareto-front"
    pairs = [(costs[0], quality) for quality in qualities[:2]]
    pairs += [(cost, qualities[0]) for cost in costs[1:]]
    return {
        "searchFilter": f"tags.pareto = 'true' AND tags.search_id = '{search_id}'",
        "orderByKey": "metrics.`macs_ratio`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [
            *(f"metrics.`{name}`" for name in (*qualities, *costs)),
            *(f"params.`{name}`" for name in ("criterion", "allocation", "removed")),
        ],
        "runsHiddenMode": "SHOW_ALL",
        "runsPinned": [],
        "runsHidden": [],
        "runsExpanded": {},
        "useGroupedValuesInCharts": True,
        "autoRefreshEnabled": False,
        "groupBy": None,
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "compareRunCharts": [
            *(_scatter(section, cost, quality) for cost, quality in pairs),
            {
                **_chart("decisions", section, "PARALLEL"),
                "selectedParams": ["criterion"],
                "selectedMetrics": [*costs, *reversed(qualities)],
                "showAllRuns": False,
            },
        ],
        "compareRunSections": [
            {
                "uuid": section,
                "name": "Pareto front",
                "display": True,
                "isReordered": False,
                "columns": 2,
                "cardHeight": 380,
            }
        ],
    }


def _chart(name: str, section: str, kind: str) -> dict[str, Any]:
    return {
        "uuid": name,
        "type": kind,
        "runsCountToCompare": 100,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
    }


def _scatter(section: str, over: str, metric: str) -> dict[str, Any]:
    return {
        **_chart(f"{metric}-over-{over}", section, "SCATTER"),
        "xaxis": {"key": over, "type": "METRIC"},
        "yaxis": {"key": metric, "type": "METRIC"},
    }
