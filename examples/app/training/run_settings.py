"""What the losses of a run depend on: a run goes on from a checkpoint only if all of it is as it was."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from app.models.fingerprint import files_fingerprint
from app.runs.launch import WORLD_SIZE
from app.training.options import ModelOptions, TrainingOptions

#: Options of TrainingArguments that may differ, by name or by how the name begins: those for the length of a run, for
#: what it says, saves and measures, and for how fast it is. Any other one counts, also one that is new in transformers.
MAY_DIFFER = (
    "max_steps", "num_train_epochs", "resume_from_checkpoint", "ignore_data_skip", "restore_callback_states", "log",
    "report_to", "run_name", "project", "trackio", "disable_tqdm", "debug", "include_num_input_tokens_seen",
    "include_for_metrics", "output_dir", "save_", "push_to_hub", "hub_", "enable_jit_checkpoint", "load_best_model",
    "metric_for_best_model", "greater_is_better", "eval_", "do_", "per_device_eval", "bf16_full_eval",
    "fp16_full_eval", "prediction_loss_only", "batch_eval", "skip_memory_metrics", "use_cpu", "local_rank", "ddp_",
    "dataloader_", "gradient_checkpointing", "activation_checkpointing", "torch_empty_cache_steps",
)  # fmt: skip
BUT = ("dataloader_drop_last",)


def settings(options: ModelOptions, args: TrainingOptions) -> dict[str, Any]:
    """All that the losses depend on, but for the text (`TrainingData.settings`) and what that decides
    (`steps.fit_to_steps`)."""
    arguments = {
        name: value
        for name, value in args.to_dict().items()
        if (name in BUT or not name.startswith(MAY_DIFFER)) and name not in args.by_steps
    }
    zero = dict(args.deepspeed_plugin.deepspeed_config) if args.deepspeed_plugin else {}
    arguments["zero_stage"] = zero.pop("zero_optimization", {}).get("stage")  # the rest is about memory and speed
    if options.dense_steps:  # they are counted from the end
        arguments |= {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
    arguments["deepspeed"] = {name: value for name, value in zero.items() if name != "steps_per_print"}
    model = asdict(options)
    for name in ("recipe", "check_retrieval"):  # a name for other settings, and what is only measured
        del model[name]
    # It may lie elsewhere by now.
    model["model"] = files_fingerprint(model.pop("model_name_or_path"), options.gguf_file)
    return {**model, **arguments, "processes": WORLD_SIZE}
