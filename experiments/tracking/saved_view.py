"""The saved view that opens MLflow's runs page on a front: an experiment tag and a link to it.

MLflow does not document the tag's format; if a later version reads it no more, the page opens
without filter and charts, and nothing else is lost.
"""

from __future__ import annotations

import json
from typing import Any

_PREFIX = "mlflow.sharedViewState."


def view_tag(search_id: str, title: str, created: int) -> tuple[str, str]:
    """Returns name and value of the experiment tag that stores the view of one search.

    Args:
        search_id: Value of the tag `search_id` that the runs of the search carry.
        title: Name of the view in MLflow's drop-down list.
        created: Time in milliseconds since 1970.
    """
    value = {"name": title, "createdAt": created, "state": json.dumps(_state(search_id))}
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


def _state(search_id: str) -> dict[str, Any]:
    """Returns the runs page's state: the front's runs by MACs, and four charts of them."""
    section = "pareto-front"
    return {
        "searchFilter": f"tags.pareto = 'true' AND tags.search_id = '{search_id}'",
        "orderByKey": "metrics.`macs_ratio`",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [
            *(f"metrics.`{name}`" for name in ("accuracy", "loss", "macs_ratio", "params")),
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
            _scatter("accuracy-over-macs", section, "macs_ratio", "accuracy"),
            _scatter("loss-over-macs", section, "macs_ratio", "loss"),
            _scatter("accuracy-over-params", section, "params", "accuracy"),
            {
                **_chart("decisions", section, "PARALLEL"),
                "selectedParams": ["criterion"],
                "selectedMetrics": ["macs_ratio", "params", "loss", "accuracy"],
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


def _scatter(name: str, section: str, over: str, metric: str) -> dict[str, Any]:
    return {
        **_chart(name, section, "SCATTER"),
        "xaxis": {"key": over, "type": "METRIC"},
        "yaxis": {"key": metric, "type": "METRIC"},
    }
