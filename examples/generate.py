"""Ask a model about a long file, and read the answer as it comes.

python examples/generate.py --model finetuned/my-llama-32768/adapter --file book.txt --question "Who is Ishmael?"
python examples/generate.py --help
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from app.runs import launch

from app.runs.launch import stay_alone  # isort: skip  (first: sets what torch and DeepSpeed read at import)
from transformers import TextStreamer, set_seed

from app.inputs.chat import LLAMA_2
from app.inputs.reading import decoded
from app.inputs.template import parsed, template_of_json
from app.models.answer import DEFAULT_NEW_TOKENS, SAMPLING, generation_config, room_for, tokens, write
from app.models.suitable import check_largest_token
from app.models.use_model import add_model_options, add_scaling_options, check_model_options, open_model
from app.runs.command_line import HelpFormatter, Parser, as_program
from app.runs.errors import one_clear_error
from app.runs.processes import be_quiet

DESCRIPTION = """\
Answer a question about a long text with a base model, a merged model or an adapter.

If the tokenizer has a chat template (an adapter trained with --task sft has one), the text followed by the question is
a user message. Otherwise the prompt is the text, a line with the question ("Question: ...") and "Answer:", for a base
model to continue. Attention is dense. The tokens are counted before anything is computed: more than the model was
trained on are an error, unless you pass --beyond_trained_length.
"""

EXAMPLES = """\
examples:
  the tiny Llama that ships with the project, which knows Python source and no English:
    printf 'import os\\n\\n\\ndef main():\\n' | python examples/generate.py --file - --max_new_tokens 40

  an adapter on a book, sampled:
    python examples/generate.py --model finetuned/my-llama-32768/adapter --file book.txt \\
        --question "What does the captain want?" --temperature 0.7 --top_p 0.9
"""

MIN_TEMPERATURE = 1e-6  # logits are divided by it, in float32


@as_program("generate.py")
def main(argv: Sequence[str]) -> None:
    """Count, then answer."""
    options = parse(argv)
    be_quiet()
    with one_clear_error():
        text = read("--file", options.file)
        template = options.chat_template and chat_template(options.chat_template)
    with one_clear_error(f"--model {options.model}: "):
        opened = open_model(options)
    if template is not None:
        opened.tokenizer.chat_template = template
    with one_clear_error("" if template is None else f"--chat_template {options.chat_template}: "):
        ids = tokens(opened.tokenizer, text, options.question)
    with one_clear_error():
        check_largest_token(opened.base.config, int(ids.max()))
        new = room_for(opened, ids.shape[1], options.max_new_tokens, options.beyond_trained_length)
        sampling = {name: getattr(options, name) for name in SAMPLING if getattr(options, name) is not None}
        config = generation_config(opened, new, options.question is not None, **sampling)
    print(f"{ids.shape[1]:,} tokens read, at most {new:,} to come", file=sys.stderr, flush=True)
    set_seed(options.seed)
    with one_clear_error(only=(ValueError, RuntimeError)):
        write(opened, ids, config, TextStreamer(opened.tokenizer, skip_prompt=True, skip_special_tokens=True))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SystemExit: On a mistake, after saying what it is; and after --help.
    """
    parser = Parser(
        prog=launch.program,
        usage="python examples/generate.py --file FILE [OPTIONS]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
    )
    group = parser.add_argument_group("text")
    group.add_argument(
        "--file", type=os.path.expanduser, required=True, help="the text to read (UTF-8); - for standard input"
    )
    group.add_argument("--question", help="what to ask about it; without it, the model continues the text")
    group.add_argument(
        "--chat_template",
        type=os.path.expanduser,
        help="a Jinja file, chat_template.json, or llama2, in place of the tokenizer's own; for instruction-tuned "
        "models that have no chat template",
    )
    group = parser.add_argument_group("answer (default: as the model's generation_config says)")
    group.add_argument(
        "--max_new_tokens",
        type=int,
        help=f"tokens of the answer at most; default: what is left of the context, up to {DEFAULT_NEW_TOKENS}",
    )
    group.add_argument("--temperature", type=float, help="0: the likeliest token each time; above: sampled")
    group.add_argument("--top_p", type=float, help="sample from the likeliest tokens that make up this probability")
    group.add_argument("--top_k", type=int, help="sample from this many of the likeliest tokens")
    group.add_argument("--repetition_penalty", type=float, help="above 1: penalise repetitions")
    group.add_argument("--seed", type=int, default=0, help="seed of the sampling")
    add_model_options(parser)
    add_scaling_options(parser)
    options = parser.parse_args(argv)
    check_model_options(parser, options)
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        parser.error(f"--max_new_tokens must be 1 or more, got {options.max_new_tokens}")
    if options.temperature not in (None, 0) and not MIN_TEMPERATURE <= options.temperature < math.inf:
        parser.error(f"--temperature must be 0, or {MIN_TEMPERATURE} or more, got {options.temperature}")
    if options.top_p is not None and not 0 < options.top_p <= 1:
        parser.error(f"--top_p must be above 0 and at most 1, got {options.top_p}")
    if options.top_k is not None and options.top_k < 1:
        parser.error(f"--top_k must be 1 or more, got {options.top_k}")
    for name in ("top_p", "top_k"):
        if options.temperature == 0 and getattr(options, name) is not None:
            parser.error(f"--{name} has no effect with --temperature 0, which takes the likeliest token each time")
    if options.repetition_penalty is not None and not 0 < options.repetition_penalty < math.inf:
        parser.error(f"--repetition_penalty must be a number above 0, got {options.repetition_penalty}")
    if not 0 <= options.seed < 2**32:
        parser.error(f"--seed must be in 0..{2**32 - 1}, got {options.seed}")
    if options.question is not None and not options.question.strip():
        parser.error("--question is empty; without it, the model continues the text")
    if any("\ud800" <= character <= "\udfff" for character in options.question or ""):
        parser.error("--question is no text in UTF-8")
    if options.chat_template is not None and options.question is None:
        parser.error("--chat_template needs a --question")
    for name in ("file", "chat_template"):
        if getattr(options, name) == "":
            parser.error(f"--{name} is empty; it must name a file")
    stay_alone("answers")
    return options


def read(option: str, file: str) -> str:
    """The text of the file that an option names, or of standard input for `-`.

    Raises:
        ValueError: There is no such file, or no text in it.
    """
    try:
        # Of standard input the own encoding is the terminal's.
        text = decoded(sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes())
    except OSError as error:
        raise ValueError(f"{option} {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{option} {file} {error}") from error
    if not text.strip():
        raise ValueError(f"{option} {file} holds no text")
    return text


def chat_template(name: str) -> str:
    """What `--chat_template` names.

    Raises:
        ValueError: There is no such file, or no template in it.
    """
    if name.lower() == "llama2":
        return LLAMA_2
    if not Path(name).exists():
        known = "a Jinja file, chat_template.json, or llama2"
        raise ValueError(f"--chat_template {name}: there is no such file; it may be {known}")
    template = read("--chat_template", name)
    try:
        template = template_of_json(template)
        parsed(template)
    except ValueError as error:
        raise ValueError(f"--chat_template {name}: {error}") from error
    return template


if __name__ == "__main__":
    main(sys.argv[1:])
