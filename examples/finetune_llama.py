"""Extend the context of a Llama-like model: LoRA, embedding and norms trained with shifted short attention.

    deepspeed examples/finetune_llama.py            # the tiny Llama that ships with the project
    deepspeed examples/finetune_llama.py --help     # any model, any text, any length

The program reads top to bottom: the model's new context, the folder to write to, the text in sequences of the
new length (or conversations in rows of it, to learn answers from), the model and whether it keeps documents apart,
the training, and what it changed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from app.runs.launch import fail, leave_group, say  # isort: skip  (first: it prepares what the libraries below look at)
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

import longlora_ext.attention  # noqa: F401  (registers attn_implementation="s2attn")
from app.inputs.chat import give_template
from app.inputs.corpus import stdlib_documents
from app.inputs.files import load_documents
from app.inputs.samples import Samples, hold_out_samples, read_samples
from app.inputs.tokens import Tokenised, hold_out, tokenise
from app.models.convert_gguf import convert_gguf
from app.models.folders import check_model_folder
from app.models.four_bits import four_bits
from app.models.source import check_config
from app.models.suitable import (
    check_attention,
    check_context,
    check_kernels,
    check_tokenizer,
    check_tokens,
    padding_token,
)
from app.runs.checkpoints import CompletionMarker, step_of
from app.runs.command_line import as_program, one_clear_error
from app.runs.full_disk import writing_to
from app.runs.processes import be_quiet
from app.runs.run_folder import begin, claim, read_marker
from app.training.arguments import compute_dtype, parse
from app.training.dense_tail import DenseTail
from app.training.fsdp import choose_layers
from app.training.manifest import check_repeats, describe, finish, repeated
from app.training.measure import AFTER, Measurement, choose_documents, choose_samples
from app.training.options import DataOptions, ModelOptions
from app.training.plot import loss_curve
from app.training.report import banner, results
from app.training.run_settings import settings
from app.training.shared_sequences import check_sharing, trainer_of
from app.training.stop_at_nan import StopAtNaN
from app.training.suitable import check_documents, check_training
from app.training.template_date import SETTING, template_date
from longlora_ext._processes import first_process_first, is_first_process, wait_for_all
from longlora_ext.adapter import is_tied, load_base, lora_config, prepare_model, save_adapter, stop_at
from longlora_ext.adapter._load import MADE_BASE
from longlora_ext.config import DEFAULT_GROUP_RATIO, config_for, context_length, rope_type_of, settle_context
from longlora_ext.data import PackedSequences, SampleRows, pad_rows
from longlora_ext.loss import refusal, tile_loss


@as_program("finetune_llama.py", stopped="stopped; --resume_from_checkpoint latest goes on from the last checkpoint")
def main(argv: Sequence[str]) -> None:
    """The whole run. What can be refused is refused before the training starts."""
    argv, original = repeated(argv)
    options, text, args = parse(argv)
    be_quiet()
    dtype = compute_dtype(args)
    model_path = options.model_name_or_path

    with one_clear_error(f"--model_name_or_path {model_path}: "):
        check_model_folder(model_path)
        check_config(model_path, options.gguf_file)
        source = {"gguf_file": options.gguf_file} if options.gguf_file else {}
        base_config = AutoConfig.from_pretrained(model_path, **source)
        base_config = settle_context(base_config, options.present_context_length)
        check_attention(base_config, options.context_length)
    with one_clear_error():
        check_kernels(base_config, dtype, args.device, sink=options.sink, window=options.window)
        config = new_context(base_config, options)
        context = context_length(config)
        check_sharing(config, options)
        name = f"{Path(options.gguf_file or model_path).name.removesuffix('.gguf')}-{context}"
        chosen = settings(options, args)
        folder, checkpoint = claim(args, name, chosen)
    with one_clear_error(f"the tokenizer of {model_path}: "):
        tokenizer = AutoTokenizer.from_pretrained(model_path, **source)
        check_tokenizer(tokenizer)
        if text.task == "sft":
            give_template(tokenizer)
    with one_clear_error():
        day = template_date(tokenizer, checkpoint, original) if text.task == "sft" else None
        train, held_out = read(text, tokenizer, context, day)
        padding = padding_token(tokenizer, base_config)
        sequences, eval_sequences = (
            SampleRows(part.rows, context, padding, packed=text.rows == "packed")
            if isinstance(part, Samples)
            else PackedSequences(part.arrow_ids, context, padding, own_rows=text.rows == "padded")
            for part in (train, held_out)
        )
        check_tokens(base_config, train, held_out)
        check_training(args, sequences)
        chosen |= sequences.fingerprint() | ({SETTING: day.isoformat()} if day else {})
        check_repeats(original, chosen)
        begin(folder, checkpoint, chosen, describe(argv, options, text, args, config, checkpoint, chosen))
    with one_clear_error(f"--model_name_or_path {model_path}: "):
        if options.gguf_file:
            model_path = convert_gguf(model_path, options.gguf_file, folder / MADE_BASE, dtype)
        set_seed(args.seed)
        quantised: dict[str, Any] = {"quantization_config": four_bits(dtype)} if options.load_in_4bit else {}
        base = load_base(model_path, config=config, dtype=dtype, attn_implementation="s2attn", **quantised)
        lora = {"r": options.lora_r, "lora_alpha": options.lora_alpha}
        model = prepare_model(base, None if options.full_finetune else lora_config(base, **lora))
        if isinstance(train, Samples) and (new := stop_at(model, train.ends)):
            say(f"note: answers end with {' '.join(tokenizer.convert_ids_to_tokens(new))}: generation will stop there")
        if args.fsdp:
            choose_layers(args, model)
        if not args.use_liger_kernel:  # which has a loss of its own
            spare_logits(model)
        if options.full_finetune and is_tied(base):
            # A checkpoint has a tied weight once. Told so, the Trainer does not warn of the other name when it resumes.
            base._keys_to_ignore_on_save = list(base._tied_weights_keys or ())

    answers = None
    if isinstance(held_out, Samples):
        measured, answers = choose_samples(held_out, text.eval_tokens)
    else:
        measured = choose_documents(held_out, text.eval_tokens, context)
    measurement = None
    marked = {"resumable": not args.save_only_model, "settings": chosen}
    if measured:
        before = read_marker(checkpoint).get("perplexity") if checkpoint else None
        measurement = Measurement(folder, base_config, config, measured, before, answers)
        marked["perplexity"] = measurement.record  # filled as the run goes on, written with each checkpoint
    tail = DenseTail(base.config, options.dense_steps) if options.dense_steps else None
    callbacks = [StopAtNaN(), CompletionMarker(args, marked), *filter(None, (tail, measurement))]
    # Resumed at its end, a run would do one step too many. Of one sequence an epoch is one step: all are over then.
    is_over = checkpoint is not None and 0 < args.max_steps <= step_of(checkpoint)
    trainer = trainer_of(options)(
        model=model,
        args=args,
        train_dataset=torch.utils.data.Subset(sequences, [0]) if is_over else sequences,
        eval_dataset=eval_sequences,
        data_collator=partial(pad_rows, pad_token_id=padding),
        callbacks=callbacks,
    )
    with one_clear_error(f"--model_name_or_path {options.model_name_or_path}: "):
        check_documents(model, args, packed=text.rows == "packed")
    say(banner(options, args, base_config, model, train, sequences, checkpoint))
    with writing_to(folder):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step == 0:
            fail("not a single step was done: there is nothing to save")

        adapter = folder / ("model" if options.full_finetune else "adapter")
        if checkpoint and is_first_process() and adapter.exists():
            # The run was at its end before, or was shorter then. The checkpoint it went on from has all that is needed.
            shutil.rmtree(adapter)
        wait_for_all()
        try:
            save_adapter(model, adapter, tokenizer)
        except ValueError as error:  # what came of it are no numbers
            fail(str(error))
        if measurement:
            measurement.measure(model, args, AFTER)
        if is_first_process():
            loss_curve(trainer.state.log_history, folder / "loss.png", name)
            if measurement:
                (folder / "perplexity.txt").write_text(measurement.table())
            finish(
                folder, adapter, {"steps": trainer.state.global_step, "first_dense_step": tail.first if tail else None}
            )
    say(results(folder, adapter, measurement, options.full_finetune))
    wait_for_all()
    leave_group()


def new_context(base_config: PreTrainedConfig, options: ModelOptions) -> PreTrainedConfig:
    """The config for the new context. The model's own leaves RoPE alone, and a shorter one is refused."""
    old = context_length(base_config)
    new = options.context_length or 4 * old
    if options.context_length is None and rope_type_of(base_config) != "default":
        say(f"note: the model's RoPE is scaled already, to {old:,} tokens; --context_length {old} leaves it at that")
    check_context("--context_length", new, old)
    if new == old and (options.rope_parameters or options.rope_type != "linear"):
        raise ValueError(f"--context_length {new} is the model's own: RoPE is not scaled for it")
    if new == old and (options.group_size or 0) > 2 * new:
        raise ValueError(f"--group_size {options.group_size} is more than twice the context of {new}")
    return config_for(
        base_config,
        new,
        rope_type=options.rope_type,
        rope_parameters=json.loads(options.rope_parameters or "{}"),
        group_ratio=options.group_ratio or DEFAULT_GROUP_RATIO,
        group_size=options.group_size,
        sink=options.sink,
        window=options.window,
    )


def spare_logits(model: PreTrainedModel | PeftModel) -> None:
    """Compute the loss without the logits of all tokens, wherever that is the same loss."""
    reason = refusal(model)
    if reason is None:
        tile_loss(model)
    else:
        say(f"note: the logits of whole sequences are kept in memory: {reason}")


def read(
    text: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    day: date | None = None,
) -> tuple[Tokenised, Tokenised]:
    """What to train on and what is held out, as tokens: documents, or `Samples` where answers are learned.

    `day` is what a chat template takes for today.
    """

    def tokens_of(sources: list[str], option: str) -> Tokenised:
        if text.task == "sft":
            return read_samples(sources, tokenizer, context, day)
        found = tokenise(load_documents(sources, text.text_column), tokenizer)
        if found.tokens < 2:
            raise ValueError(f"--{option} {' '.join(sources)} holds no text")
        return found

    def both() -> tuple[Tokenised, Tokenised]:
        if text.train_file is None:
            train, held_out = (tokenise(part, tokenizer) for part in stdlib_documents())
            return train, held_out
        train = tokens_of(text.train_file, "train_file")
        if text.eval_file is not None:
            return train, tokens_of(text.eval_file, "eval_file")
        return hold_out_samples(train) if isinstance(train, Samples) else hold_out(train)

    return first_process_first(both)  # who fills the cache


if __name__ == "__main__":
    main(sys.argv[1:])
