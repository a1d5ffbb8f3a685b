"""What a person sees of a search in the MLflow UI, looked at in Chromium."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from paretoprune.experiments.runs import RunSpec, create_run
from paretoprune.experiments.showing.view import SearchView
from paretoprune.experiments.tracking.tracker import MlflowListener
from tests.unit.experiments.infos import info_of

SECONDS = 60_000.0
"""Milliseconds within which a page must have drawn itself, also on a busy machine."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("needs Chromium; on Debian: apt install chromium")
    options = ["--no-sandbox", "--disable-background-networking", "--no-first-run"]
    expect.set_options(timeout=SECONDS)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=found, args=options)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page of a person who was never here before."""
    with browser.new_context(viewport={"width": 1600, "height": 1400}) as context:
        context.set_default_timeout(SECONDS)
        yield context.new_page()


@dataclass(frozen=True)
class Links:
    """The addresses that `paretoprune ui` printed."""

    front: str
    runs: str

    @property
    def server(self) -> str:
        return self.front.split("/#")[0]


@pytest.fixture(scope="module")
def links(
    browser: Browser,
    tmp_path_factory: pytest.TempPathFactory,
    empty_database: Path,
    view: SearchView,
) -> Iterator[Links]:
    """The UI over a made-up search, started as a user does; `browser` first, which may skip."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        runs = tmp_path_factory.mktemp("browser") / "runs"
        spec = RunSpec("made-up", 0.5, 7, ("l2", "taylor"))
        folder = create_run(runs, "first", spec)
        shutil.copy(empty_database, runs)
        written = MlflowListener(folder, spec)
        written.started(info_of(view, view.records))
        written.ended(None)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-m", "paretoprune.experiments", "ui", "first"]
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                [*command, "--runs-dir", str(runs), "--port", port],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            assert process.stdout is not None
            said = [process.stdout.readline() for _ in range(3)]
            log.seek(0)
            assert said[0].startswith("MLflow shows first until Ctrl-C"), log.read()
        try:
            yield Links(*(re.search(r"http\S+", line)[0] for line in said[1:]))  # type: ignore[index]
        finally:
            process.terminate()
            process.communicate(timeout=60)


def test_the_page_of_the_front_tells_each_trial(page: Page, links: Links) -> None:
    page.goto(links.front)
    shown = page.frame_locator("iframe")
    expect(shown.locator("h1")).to_contain_text("trial 1 keeps 49.8")
    plot = shown.locator(".plotly-graph-div").first
    for text in ("budget 50 %", "dense network: 99", "one-shot baseline", "Pareto front"):
        expect(plot.get_by_text(text).first).to_be_visible()
    marks = plot.locator("g.scatterlayer g.trace").nth(3).locator("path.point")
    expect(marks).to_have_count(3)
    marks.nth(1).hover(force=True)  # trial 3, which removes a block
    hover = plot.locator("g.hoverlayer")
    for fact in (
        "trial 3",
        "MACs 300.0 k, 30.0 %",
        "accuracy 93.00 %",
        "params 6.00 k",
        "criterion l2",
        "removed blocks: layer1.1",
    ):
        expect(hover).to_contain_text(fact)
    for heading in ("The best network", "What the front removes", "Hypervolume of the front"):
        expect(shown.get_by_role("heading", name=heading)).to_be_attached()
    expect(shown.locator(".plotly-graph-div")).to_have_count(4)


def test_the_saved_view_opens_on_the_runs_of_the_front(page: Page, links: Links) -> None:
    page.goto(links.runs)
    for name in ("t001 95.0% @ 49.8%", "t003 93.0% @ 30.0%", "t004 70.0% @ 20.0%"):
        expect(page.get_by_role("link", name=name)).to_be_visible()
    expect(page.get_by_text("3 matching runs")).to_be_visible()
    for chart in ("macs_ratio vs. accuracy", "macs_ratio vs. loss", "Parallel Coordinates"):
        expect(page.get_by_text(chart)).to_be_visible()


def test_the_table_has_the_columns_in_a_useful_order(page: Page, links: Links) -> None:
    page.goto(links.runs.replace("&compareRunsMode=CHART", ""))
    expect(page.get_by_role("link", name="t001")).to_be_visible()
    wanted = ["accuracy", "loss", "macs_ratio", "params", "allocation", "criterion"]
    places = []  # within metrics and params MLflow sorts by name
    for name in wanted:
        head = page.get_by_role("columnheader", name=name, exact=True).first
        expect(head).to_be_visible()
        box = head.bounding_box()
        assert box is not None
        places.append(box["x"])
    assert places == sorted(places)


def test_a_filter_by_tag_finds_the_front(page: Page, links: Links) -> None:
    page.goto(f"{links.server}/#/experiments/1/runs?workflowType=machine_learning")
    search = page.get_by_placeholder("metrics.rmse")
    search.fill("tags.pareto = 'true'")
    search.press("Enter")
    expect(page.get_by_text("4 matching runs")).to_be_visible()  # the parent is shown with them
    page.get_by_role("row").filter(has_text="first").get_by_role("button").first.click()
    for name in ("t001 95.0% @ 49.8%", "t003 93.0% @ 30.0%", "t004 70.0% @ 20.0%"):
        expect(page.get_by_role("link", name=name)).to_be_visible()


def test_the_search_describes_itself_and_leads_to_the_front(page: Page, links: Links) -> None:
    page.goto(links.front.split("/artifacts/")[0] + "?workflowType=machine_learning")
    expect(page.get_by_text("Budget: at most 500.0 k MACs, 50.0 %")).to_be_attached()
    expect(page.get_by_text("7 trials of made-up with l2, taylor")).to_be_attached()
    with page.context.expect_page() as opened:
        page.get_by_role("link", name="Open the front, interactive").click()
    shown = opened.value.frame_locator("iframe")
    expect(shown.locator("h1")).to_contain_text("trial 1 keeps 49.8")
    opened.value.close()
