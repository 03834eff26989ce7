"""Takes the picture of the demo page that the README shows: assets/demo.png.

  python -m benchmarks.screenshot [OUTPUT.png]

Starts launch.serve with the model that ships, asks the first example in a headless Chromium, goes to a moment
of the answer, and takes the picture. Needs the extras `serve` and `test`, and a Chromium of the system.
"""

import pathlib
import subprocess
import sys

from playwright import sync_api

from tests import browser

ROOT = pathlib.Path(__file__).resolve().parent.parent
SIZE = {"width": 1180, "height": 860}


def main(output: str = str(ROOT / "assets/demo.png")) -> None:
    command = [sys.executable, "-m", "launch.serve", "--model=assets/nano", "--port=0", "--buckets=16"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            ready = server.stdout.readline()
            if " at http" not in ready:
                sys.exit(f"error: the server must start; got {ready!r}")
            take(ready.rpartition(" at ")[2].strip().removesuffix("v1"), output)
        finally:
            server.terminate()
            server.communicate()


def take(url: str, output: str) -> None:
    """Writes the picture of the page at a URL after an answer."""
    with sync_api.sync_playwright() as driver:
        page = browser.launch(driver).new_page(viewport=SIZE, device_scale_factor=1.5)
        page.goto(url)
        page.get_by_role("button", name="track the diamond").click()
        question = page.get_by_role("textbox", name="Question")
        sync_api.expect(question).to_have_value("Track the red diamond.")
        question.press("Enter")
        page.locator(".turn footer").wait_for(timeout=120_000)
        page.get_by_role("button", name="1.5 seconds").click()
        page.locator("video").evaluate("video => new Promise(done => video.seeking"
                                       " ? video.addEventListener('seeked', done, {once: true}) : done())")
        question.fill("How many red diamond are there in the video?")
        page.mouse.move(0, 0)
        page.wait_for_timeout(4000)   # until the video's controls fade
        page.screenshot(path=output)


if __name__ == "__main__":
    main(*sys.argv[1:])
