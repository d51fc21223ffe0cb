"""A notebook in a real JupyterLab, driven through a headless Chromium; skipped where one of them is missing."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
#: WebGL in software, and no sandbox: it does not start for root.
SWITCHES = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
#: What a cell that raises shows.
BROKEN = '.jp-OutputArea [data-mime-type="application/vnd.jupyter.error"]'
#: A panel's picture with nothing in it is smaller.
BLANK_BYTES = 4000

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
]


@pytest.fixture
def jupyterlab(tmp_path):
    """URL and folder of a JupyterLab with settings of its own, which ends with the test."""
    pytest.importorskip("jupyterlab", reason='needs JupyterLab (pip install "lumirlib[lab]")')
    folder, state = tmp_path / "notebooks", tmp_path / "state"
    folder.mkdir()
    settings = {
        "notebook-extension/tracker": {"windowingMode": "none"},
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    }
    for name, values in settings.items():
        path = state / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    places = {
        "JUPYTER_CONFIG_DIR": state / "config",
        "JUPYTER_RUNTIME_DIR": state / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": state / "settings",
        "JUPYTERLAB_WORKSPACES_DIR": state / "workspaces",
        "LUMIRLIB_RESULTS": ROOT / "results",
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.port=0",
        "--IdentityProvider.token=test",
        f"--ServerApp.root_dir={folder}",
    ]
    with (state / "log.txt").open("w") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **{name: str(path) for name, path in places.items()}}, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 60
            while not (running := list((state / "runtime").glob("jpserver-*.json"))):
                assert server.poll() is None and time.monotonic() < deadline, (state / "log.txt").read_text()
                time.sleep(0.2)
            yield json.loads(running[0].read_text())["url"], folder
        finally:
            server.terminate()
            server.wait(timeout=30)


def panels_when(canvases, has_happened, before=None, seconds=60):
    """Pictures of all panels as soon as `has_happened(before, now)` of each; without `before`, of one a second ago."""
    deadline, first = time.monotonic() + seconds, before or [canvas.screenshot() for canvas in canvases.all()]
    while True:
        canvases.page.wait_for_timeout(1000)
        now = [canvas.screenshot() for canvas in canvases.all()]
        done = [has_happened(*pair) for pair in zip(first, now, strict=True)]
        if all(done):
            return now
        assert time.monotonic() < deadline, f"of the panels, these have changed as they should: {done}"
        first = before or now


def test_start_page_runs_in_jupyterlab_and_its_viewer_links_the_cursors(jupyterlab, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright (pip install "lumirlib[browser]")')
    pytest.importorskip("ipyniivue", reason="needs ipyniivue, of requirements.txt")
    url, folder = jupyterlab
    path = folder / "00_start_here.ipynb"
    notebook = nbformat.read(ROOT / "notebooks" / path.name, 4)
    for cell in notebook.cells:  # nothing of an earlier run may pass for this one's
        if cell.cell_type == "code":
            cell.update(outputs=[], execution_count=None)
    notebook.metadata.pop("widgets", None)
    nbformat.write(notebook, path)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1500, "height": 1100})
        broken: list[str] = []
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(f"{url}lab/tree/{path.name}?token=test")
        # an indicator is idle before there is a kernel, and "Run All Cells" would then ask for one in a dialog
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=90_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_function(
            "(broken) => { const all = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];"
            " return document.querySelector(broken) ||"
            " (all.length && all.every((prompt) => /\\d/.test(prompt.innerText))); }",
            arg=BROKEN,
            timeout=300_000,
        )
        assert not page.locator(BROKEN).count(), page.locator(BROKEN).first.inner_text()
        canvases = page.locator(".jp-OutputArea canvas")
        canvases.nth(3).wait_for(timeout=60_000)
        canvases.nth(3).scroll_into_view_if_needed()
        drawn = panels_when(canvases, lambda before, now: before == now and len(now) > BLANK_BYTES)
        page.screenshot(path=tmp_path / "opened.png")
        box = canvases.nth(0).bounding_box()
        for act in (
            lambda: page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"]),
            lambda: page.mouse.wheel(0, 100),
            lambda: page.get_by_role("button", name="sagittal").click(),
        ):
            act()
            drawn = panels_when(canvases, lambda before, now: before != now, drawn)
        page.screenshot(path=tmp_path / "sagittal.png")
        page.keyboard.press("Control+s")
        page.wait_for_timeout(3000)
        browser.close()
    assert len(drawn) == 4
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not broken
