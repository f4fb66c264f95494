"""Whether the output layer is the embedding: asked of the weights, as a config may say so of a file with two."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


def is_tied(model: PreTrainedModel) -> bool:
    """Whether a model's output layer has the embedding's weight."""
    output = model.get_output_embeddings()
    return output is not None and output.weight is model.get_input_embeddings().weight


def say_tied(config: PreTrainedConfig, tied: bool) -> None:
    """Let a config say whether the weights are tied, whichever of its parts is asked."""
    for part in (config, config.get_text_config()):
        if getattr(part, "tie_word_embeddings", tied) != tied:
            part.tie_word_embeddings = tied


def settle_tying(model: PreTrainedModel) -> None:
    """Let a model's config say what its weights are: what is saved by it is loaded again as it was.

    transformers ties what a config says is tied, unless the file holds another output layer, as after PEFT has merged
    an adapter of the embedding. The config then stays as it is, and the next one who asks it is misled.
    """
    if model.get_output_embeddings() is not None:
        say_tied(model.config, is_tied(model))


def untie_adapted(model: PreTrainedModel) -> None:
    """Give the output layer a weight of its own if LoRA is on it, or on the embedding that it is tied to.

    PEFT merges LoRA into a weight where it is, and so would change what both compute.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    if is_tied(model) and any(isinstance(layer, BaseTunerLayer) for layer in (embedding, output)):
        layer = getattr(output, "base_layer", output)
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
