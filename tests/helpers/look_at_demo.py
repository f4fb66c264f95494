"""A visitor of examples/demo.py: python look_at_demo.py CHROMIUM PORT FOLDER. Pictures and the answer come there."""

import sys
import time
from pathlib import Path

from playwright.sync_api import Error, expect, sync_playwright

from patience import patience

TEXT = "The ship is called Pequod. "
chromium, port, folder = sys.argv[1:]
home = f"http://127.0.0.1:{port}"
expect.set_options(timeout=1000 * patience(120))
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
    for width, height in ((390, 844), (1280, 800)):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * patience(120))
        asked: list[str] = []
        page.on("request", lambda request, asked=asked: asked.append(request.url))
        end = time.monotonic() + patience(300)
        while True:  # until the model is loaded
            try:
                page.goto(home)
                break
            except Error:
                if time.monotonic() > end:
                    raise
                time.sleep(1)
        text = page.get_by_label("Text", exact=True)
        text.fill(TEXT * 5)
        expect(page.get_by_text("135 of 128 tokens")).to_be_visible()
        page.get_by_role("button", name="Ask").click()
        expect(page.get_by_text("was scaled to 128 tokens").first).to_be_visible()
        text.fill(TEXT)
        page.get_by_label("Question", exact=True).fill("Which?")
        expect(page.get_by_text("52 of 128 tokens")).to_be_visible()
        page.get_by_role("button", name="Ask").click()
        expect(page.get_by_text("52 tokens read", exact=True)).to_be_visible()
        answer = page.locator("label:has-text('Answer') textarea")
        (Path(folder) / "answer.txt").write_text(answer.input_value())
        page.get_by_role("button", name="Perplexity by position").click()
        plot = page.locator("svg.marks, canvas.marks").first
        expect(plot).to_be_visible()
        box = plot.bounding_box()
        assert box and box["width"] > 0.6 * min(width, 860) and box["x"] + box["width"] <= width, box
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert not [url for url in asked if not url.startswith((home, "data:", "blob:"))], asked
        page.screenshot(path=f"{folder}/{width}.png", full_page=True)
    browser.close()
