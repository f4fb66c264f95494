"""A web page to try a model on a long text: ask about it, and see how well the model reads it.

python examples/demo.py finetuned/my-llama-32768/adapter
python examples/demo.py --help
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from app.runs import launch

from app.runs.launch import fail, stay_alone  # isort: skip  (first: sets what torch and DeepSpeed read at import)

from app.models.use_model import add_model_options, add_scaling_options, check_model_options, open_model
from app.page.page import Page
from app.runs.command_line import HelpFormatter, Parser, as_program
from app.runs.errors import one_clear_error
from app.runs.processes import be_quiet

DESCRIPTION = """\
A web page to ask a base model, a merged model or an adapter about a text, and to see its perplexity by position. Tokens
are counted before anything is computed: more than the model was trained on are an error, unless you pass
--beyond_trained_length. The page is served to this machine alone, and works offline. It needs `pip install '.[demo]'`.
"""


@as_program("demo.py")
def main(argv: Sequence[str]) -> None:
    """Open the model, then the page."""
    options = parse(argv)
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False"}  # read when gradio is imported
    try:
        from app.page.looks import serve
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not installed: pip install '.[demo]'")
    be_quiet()
    with one_clear_error(f"--model {options.model}: "):
        opened = open_model(options)
    with one_clear_error(f"--host {options.host} --port {options.port}: "):
        serve(Page(opened, options.beyond_trained_length), options.host, options.port)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: On a mistake, after saying what it is; and after --help.
    """
    parser = Parser(
        prog=launch.program,
        usage="python examples/demo.py [MODEL] [OPTIONS]",
        description=DESCRIPTION,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("named", nargs="?", metavar="MODEL", help="the same as --model MODEL")
    group = parser.add_argument_group("page")
    group.add_argument("--host", default="127.0.0.1", help="address to serve at; 0.0.0.0: for the whole network")
    group.add_argument("--port", type=int, default=7860, help="port to serve at")
    add_model_options(parser)
    add_scaling_options(parser)
    options = parser.parse_args(argv)
    options.model = options.named or options.model
    check_model_options(parser, options)
    if not 0 < options.port < 2**16:
        parser.error(f"--port must be in 1..{2**16 - 1}, got {options.port}")
    stay_alone("serves the page")
    return options


if __name__ == "__main__":
    main(sys.argv[1:])
