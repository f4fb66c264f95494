"""The looks of examples/demo.py, in Gradio: one column, for a phone as for a desk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import gradio
import pandas as pd

from app.page.page import Page
from longlora_ext._errors import in_one_line

THEME = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no web fonts
CSS = """
.gradio-container {width: 100%; max-width: 860px !important; margin: 0 auto !important}
h1 {overflow-wrap: anywhere}
"""


def serve(page: Page, host: str, port: int) -> None:
    """Serve the page, until the program is stopped."""
    blocks(page).queue().launch(
        server_name=host, server_port=port, theme=THEME, css=CSS, footer_links=[], share=False, ssr_mode=False
    )


def blocks(page: Page) -> gradio.Blocks:
    """The page's parts, and what happens when."""
    name = "/".join(Path(page.opened.description["model"]).parts[-2:])  # "adapter" alone would not say of what
    with gradio.Blocks(title=name, analytics_enabled=False) as made:
        gradio.Markdown(f"# {name}\nAsk about a text of up to {page.opened.trained_length:,} tokens.")
        text = gradio.Textbox(label="Text", lines=7, max_lines=7, placeholder="Paste a text here, or open a file.")
        file = gradio.UploadButton("Open a text file", size="sm", file_types=["text", ".md", ".py", ".txt"])
        question = gradio.Textbox(label="Question", placeholder="Without one, the model continues the text.")
        status = gradio.Markdown(page.count("", ""))
        with gradio.Row():
            ask = gradio.Button("Ask", variant="primary", min_width=120)
            stop = gradio.Button("Stop", min_width=120)
        answer = gradio.Textbox(label="Answer", lines=5, max_lines=20, interactive=False, buttons=["copy"])
        with gradio.Accordion("How to answer", open=False):
            new = gradio.Slider(1, 2048, 512, step=1, label="Tokens at most")
            temperature = gradio.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest token each time)")
        measure = gradio.Button("Perplexity by position")
        plot = gradio.LinePlot(
            x="position", y="perplexity", x_title="position (tokens)", y_title="perplexity", height=280, visible=False
        )

        def curve(given: str) -> Any:
            parts = page.curve(given)
            points = [(position, value) for begin, end, value in parts for position in (begin, end - 1)]
            return gradio.LinePlot(pd.DataFrame(points, columns=["position", "perplexity"]), visible=True)

        file.upload(shown(page.read), file, text, api_visibility="private")
        gradio.on(
            [text.change, question.change], shown(page.count), [text, question], status,
            trigger_mode="always_last", show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        # Together they take the model one at a time.
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        asked = gradio.on(
            [ask.click, question.submit], streamed(page.answer), [text, question, new, temperature], [status, answer],
            show_progress="hidden", **alone,
        )  # fmt: skip
        stop.click(lambda: "stopped", None, status, cancels=[asked], api_visibility="private")
        measure.click(shown(curve), text, plot, **alone)
    return made


def shown(action: Callable[..., Any]) -> Callable[..., Any]:
    """Show what was wrong on the page."""

    @wraps(action)
    def called(*given: Any) -> Any:
        try:
            return action(*given)
        except Exception as error:
            raise gradio.Error(in_one_line(error), print_exception=False) from error

    return called


def streamed(action: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same, of what comes in pieces."""

    @wraps(action)
    def called(*given: Any) -> Iterator[Any]:
        try:
            yield from action(*given)
        except Exception as error:
            raise gradio.Error(in_one_line(error), print_exception=False) from error

    return called
