"""A notebook in a real JupyterLab, driven through a headless Chromium; skipped where one of them is missing."""

import itertools
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
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=90_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_function(
            "() => { const all = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')];"
            " return all.length && all.every((prompt) => /\\d/.test(prompt.innerText)); }",
            timeout=300_000,
        )
        canvases = page.locator(".jp-OutputArea canvas")
        canvases.nth(3).wait_for(timeout=60_000)
        canvases.nth(3).scroll_into_view_if_needed()
        page.wait_for_timeout(5000)  # volumes are read and drawn after their canvas is there
        page.screenshot(path=tmp_path / "opened.png")
        seen = [[canvas.screenshot() for canvas in canvases.all()]]
        box = canvases.nth(0).bounding_box()
        page.mouse.click(box["x"] + 0.4 * box["width"], box["y"] + 0.4 * box["height"])
        page.wait_for_timeout(3000)
        seen.append([canvas.screenshot() for canvas in canvases.all()])
        page.mouse.wheel(0, 100)
        page.wait_for_timeout(3000)
        seen.append([canvas.screenshot() for canvas in canvases.all()])
        page.get_by_role("button", name="sagittal").click()
        page.wait_for_timeout(3000)
        seen.append([canvas.screenshot() for canvas in canvases.all()])
        page.screenshot(path=tmp_path / "sagittal.png")
        page.keyboard.press("Control+s")
        page.wait_for_timeout(3000)
        browser.close()
    assert len(seen[0]) == 4
    for earlier, later in itertools.pairwise(seen):
        assert all(before != after for before, after in zip(earlier, later, strict=True))
    cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert not broken
