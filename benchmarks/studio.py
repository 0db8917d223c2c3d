"""Measure how soon the studio is ready and how late previews are, in Debian's headless Chromium.

    python benchmarks/studio.py [--rounds 5]

First paint is the browser's own figure, for a page that is in no cache. Lateness is the time from
the end of a step in the worker until its two pictures are set in the page; both use one clock.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "server"))
from serving import Serving, wait_for

PAINT = "performance.getEntriesByName('first-contentful-paint')[0].startTime"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    paints, forms, late = [], [], []
    with tempfile.TemporaryDirectory() as folder, Serving(Path(folder)) as server:
        server.ready()
        wait_for(lambda: server.client.get("/studio/").status_code == 200)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--no-sandbox"]
            )
            for _ in range(given.rounds):
                context = browser.new_context()
                page = context.new_page()
                page.goto(f"{server.url}/studio")
                prompt = page.get_by_label("Prompt", exact=True)
                prompt.wait_for()
                forms.append(page.evaluate("performance.now()") / 1000)
                paints.append(page.evaluate(PAINT) / 1000)
                page.get_by_label("number input for Steps").fill("150")
                prompt.fill("a red apple")
                page.get_by_role("button", name="Draw").click()
                live = page.locator(".now .live")
                live.locator("img[src]").first.wait_for()
                while live.is_visible():
                    value = live.get_attribute("data-late")
                    if value is not None and (not late or late[-1] != float(value)):
                        late.append(float(value))
                    page.wait_for_timeout(20)
                context.close()
    for name, values, unit in (
        ("first contentful paint", paints, "s"),
        ("the form can be filled", forms, "s"),
        ("a preview after its step", late, "ms"),
    ):
        middle, worst = statistics.median(values), max(values)
        sys.stdout.write(f"{name}: median {middle:.3g} {unit}, most {worst:.3g} of {len(values)}\n")


if __name__ == "__main__":
    main()
