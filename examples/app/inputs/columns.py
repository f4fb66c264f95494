"""Columns of a row that would change what the model sees or learns, by their usual spellings."""

from __future__ import annotations

#: Columns of one meaning. Of each line a row may have one.
LISTS = ("messages", "conversations", "conversation")
ASKED = ("instruction", "question", "query", "prompt")
ABOUT = ("input", "context")
ANSWERS = ("output", "response", "answer", "completion")
SYSTEMS = ("system", "system_prompt", "system_message")
TOOLS = ("tools", "functions")

PREFERENCES = "is for learning from preferences, where --task sft learns every answer"

#: Columns that are an error, by what an error says of them.
REFUSED = {
    PREFERENCES: (
        "chosen", "rejected", "chosen_response", "rejected_response", "rejected_message", "preferred_output",
        "non_preferred_output", "kto_tag",
    ),
    "holds what is no text": ("image", "images", "video", "videos", "audio", "audios"),
    "holds tokens, which --task sft makes itself": (
        "input_ids", "labels", "attention_mask", "position_ids", "completion_mask", "assistant_masks",
    ),
    "says what is learned in a way that is not known: give messages a weight, 0 or 1": (
        "mask", "masked", "loss_mask", "loss_scale", "loss_weight", "sample_weight", "train_on_input",
        "train_on_inputs",
    ),
    "would change what the model sees, and no rule says how: write it into the messages, or drop it": (
        "examples", "few_shot", "demonstrations", "choices", "options", "prefix", "suffix", "cot", "complex_cot",
        "chain_of_thought", "rationale", "thought", "thoughts", "function_call", "tool_calls", "tool_choice",
        "response_format",
    ),
}  # fmt: skip

#: Columns that repeat the conversation in many data sets. One that says something else is an error.
REPEATING = (*ASKED, *ABOUT, *ANSWERS, "text", "passage", "document", "article", "background", "persona")
