"""Extend the context of a Llama-like model: LoRA, embedding and norms trained with shifted short attention.

    deepspeed examples/finetune_llama.py            # the tiny Llama that ships with the project
    deepspeed examples/finetune_llama.py --help     # any model, any text, any length

`main` is the story of a run: the model's new context, the folder to write to, the text in rows of the new length, the
model and whether it keeps documents apart, the training, and what it changed. The parts are in `app/training`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from app.runs.launch import leave_group, say  # isort: skip  (first: sets what torch and DeepSpeed read at import)
from app.runs.command_line import as_program
from app.runs.errors import one_clear_error
from app.runs.full_disk import writing_to
from app.runs.processes import be_quiet
from app.runs.run import Run
from app.training.arguments import parse
from app.training.checks import check_documents, check_training
from app.training.context import extended, read_base_config
from app.training.data import read_data
from app.training.dense_tail import DenseTail
from app.training.manifest import check_versions, describe, repeated, say_other_length
from app.training.measure import make_measurement
from app.training.model import build_model, load_tokenizer
from app.training.report import banner, results
from app.training.result import save_result
from app.training.retrieval_guard import make_guard
from app.training.run_settings import settings
from app.training.steps import fit_to_steps, steps_of
from app.training.trainer import make_trainer
from longlora_ext._processes import wait_for_all
from longlora_ext.config import context_length


@as_program("finetune_llama.py", stopped="stopped; --resume_from_checkpoint latest goes on from the last checkpoint")
def main(argv: Sequence[str]) -> None:
    """The whole run. Bad input is an error before the training starts."""
    typed = argv
    with one_clear_error():
        argv, earlier = repeated(typed)
    options, text, args = parse(argv, typed)
    be_quiet()
    model_option = f"--model_name_or_path {options.model_name_or_path}: "

    with one_clear_error(model_option):
        base_config = read_base_config(options)
    with one_clear_error():
        config = extended(base_config, options, args)
        model_file = Path(options.gguf_file or options.model_name_or_path).name
        name = f"{model_file.removesuffix('.gguf')}-{context_length(config)}"
        run = Run.open(args.output_dir, args.resume_from_checkpoint, name, settings(options, args), earlier)
        args.output_dir = str(run.folder)
    with one_clear_error(f"the tokenizer of {options.model_name_or_path}: "):
        tokenizer = load_tokenizer(options, text.task)
    with one_clear_error():
        data = read_data(text, tokenizer, base_config, config, run, args.seed)
        check_training(args, data, options)
        steps = steps_of(args, len(data.rows), options.sequence_parallel_size)
        run.check_steps(steps)
        run.settle(data.settings | fit_to_steps(args, steps))
        check_versions(earlier)
        guard = make_guard(options, steps, tokenizer, base_config, config, run)
        run.begin(describe(argv, options, text, args, config, run, steps))
        say_other_length(run.manifest, earlier)
    with one_clear_error(model_option):
        model = build_model(options, args, config, run, tokenizer, data.train.ends)

    measurement = make_measurement(data, text.eval_tokens, base_config, config, run)
    tail = DenseTail(model.config, options.dense_steps) if options.dense_steps else None
    about = banner(options, args, steps, base_config, model, data, run)  # the Trainer's arguments are not all as given
    with one_clear_error(model_option):
        trainer = make_trainer(model, data, options, args, steps, run, measurement, guard, tail)
    with one_clear_error(f"{model_option}--rows {text.rows}: "):
        check_documents(model, args, packed=text.rows == "packed")
    say(about)
    with writing_to(run.folder):
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        result = save_result(run, model, trainer, tokenizer, options, measurement, guard, tail, title=name)
    say(results(run.folder, result, measurement, options.full_finetune))
    if guard:
        say("", guard.verdict(measurement))
    wait_for_all()
    leave_group()


if __name__ == "__main__":
    main(sys.argv[1:])
