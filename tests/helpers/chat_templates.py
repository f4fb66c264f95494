"""Chat templates of well-known models, shortened, and a tokenizer for each that knows their special tokens."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from byte_tokens import byte_tokenizer

#: Of many a base model: it knows roles and contents, and nothing else.
CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

#: Tools, calls beside text, their results, and thoughts, which only the answers to the last question keep.
QWEN_3 = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}
{% endif %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools><|im_end|>
{% elif messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% elif message.role == 'assistant' %}<|im_start|>assistant
{% if loop.index0 > ns.last and message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>
{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == 'tool' %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>
{% endif %}{% endif %}"""

#: Prints the date; of a message with a call the text is left out; a built-in tool's call ends otherwise.
LLAMA_3_1 = """\
{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now("%d %b %Y") %}{% endif %}
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools %}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}
{{- system + "<|eot_id|>" }}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" + message.content + "<|eot_id|>" }}
{%- elif 'tool_calls' in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("only single tool-calls at once!") }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}
{{- '{"name": "' + call.name + '", "parameters": ' + (call.arguments | tojson) + '}' }}
{{- "<|eom_id|>" if builtin_tools is defined else "<|eot_id|>" }}
{%- else %}
{{- "<|start_header_id|>" + message.role + "<|end_header_id|>\\n\\n" + message.content | trim + "<|eot_id|>" }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start_header_id|>assistant<|end_header_id|>\\n\\n" }}{% endif %}"""

GEMMA = """\
{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + message.role.replace('assistant', 'model') + '\\n' + message.content | trim }}<end_of_turn>
{% endfor %}
{%- if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

#: The text of a call is put together from strings.
DEEPSEEK = """\
{{ bos_token }}{% for message in messages %}
{%- if message.role == 'user' %}{{ '<|User|>' + message.content }}
{%- elif message.role == 'assistant' %}{{ '<|Assistant|>' + message.content }}
{%- for call in message.tool_calls or [] %}{{ '<call>' + call.function.name + '\\n' + call.function.arguments }}
{%- endfor %}{{ eos_token }}
{%- elif message.role == 'tool' %}{{ '<output>' + message.content }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}<|Assistant|>{% endif %}"""

PHI_3 = """\
{% for message in messages %}{{ '<|' + message.role + '|>\\n' + message.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>
{% else %}{{ eos_token }}{% endif %}"""

#: As DeepSeek-R1's and QwQ's: thoughts that stand in the content are cut off, of the last answer as well.
SPLITS = CHATML.replace("{{ message.content }}", "{{ message.content.split('</think>')[-1] }}")
SPLITS_STRIPPED = SPLITS.replace("[-1] }}", "[-1].lstrip('\n') }}")

SPECIAL = {
    CHATML: ("<|im_start|>", "<|im_end|>"),
    QWEN_3: ("<|im_start|>", "<|im_end|>"),
    LLAMA_3_1: ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
    GEMMA: ("<start_of_turn>", "<end_of_turn>"),
    DEEPSEEK: ("<|User|>", "<|Assistant|>"),
    PHI_3: ("<|user|>", "<|assistant|>", "<|system|>"),
}


def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """One token a byte and one for each special token of the template; texts end with another one, <|endoftext|>."""
    tokenizer = byte_tokenizer(template, bos_token="<bos>", eos_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL[template])})
    return tokenizer
