"""Templates as the families' published ones are built, without what they say of tools, dates and defaults."""

LOOP = "{{ bos_token }}{% for m in messages %}"
END = "{% endfor %}"
USER = "{% if m.role == 'user' %}"
ELSE = "{% else %}"
FI = "{% endif %}"
LINE = "{{ '\\n' }}"
"""A line's end behind a tag, where jinja leaves one out that is written as such."""
THOUGHT = "{{ m.content.split('</think>')[-1].lstrip('\\n') }}"
"""A reply without its reasoning."""


def reply(opener: str) -> str:
    """Where a reply is asked for."""
    return f"{{% if add_generation_prompt %}}{opener}{FI}"


def unless_thinking(block: str, otherwise: str = "") -> str:
    """What a reply opens with where the request turns reasoning off."""
    return f"{{% if enable_thinking is false %}}{block}{ELSE}{otherwise}{FI}"


def named(opener: str, closer: str, said: str = "{{ m.content }}") -> str:
    """Each turn between an opener that names its role and a closer."""
    return LOOP + opener + said + closer + END


CHATML = named("<|im_start|>{{ m.role }}\n", "<|im_end|>\n")
ASKED = "<|im_start|>assistant\n"
AFTER_QUERY = (
    f"{{% if loop.last and m.role == 'assistant' %}}<think>\n\n</think>\n\n{FI}"
    f"{{% if m.role == 'assistant' %}}{THOUGHT}{ELSE}{{{{ m.content }}}}{FI}"
)


def of_replies(said: str) -> str:
    """What stands for a reply's text; others' is as it is."""
    return f"{{% if m.role == 'assistant' %}}{said}{ELSE}{{{{ m.content }}}}{FI}"


STRUCTURES = {
    "ChatML": CHATML + reply(ASKED),
    "Qwen3": named("<|im_start|>{{ m.role }}\n", "<|im_end|>\n", AFTER_QUERY)
    + reply(ASKED + unless_thinking("<think>\n\n</think>\n\n")),
    "Qwen3, reasoning by field": named(
        "<|im_start|>{{ m.role }}\n",
        "<|im_end|>\n",
        of_replies("<think>\n\n</think>\n\n{{ m.content }}"),
    )
    + reply(ASKED + unless_thinking("<think>\n\n</think>\n\n", "<think>\n")),
    "Gemma": LOOP
    + f"<start_of_turn>{{% if m.role == 'assistant' %}}model{ELSE}{{{{ m.role }}}}{FI}{LINE}"
    + "{{ m.content | trim }}<end_of_turn>\n"
    + END
    + reply("<start_of_turn>model\n"),
    "Llama 3": named("<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n", "<|eot_id|>")
    + reply("<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "Llama 2": LOOP
    + f"{USER}[INST] {{{{ m.content }}}} [/INST]{ELSE} {{{{ m.content }}}} </s>{FI}"
    + END,
    "Mistral": LOOP
    + f"{USER}[INST]{{{{ m.content }}}}[/INST]{ELSE}{{{{ m.content }}}}</s>{FI}"
    + END,
    "GPT-OSS (harmony)": "<|start|>system<|message|>Valid channels: analysis, commentary, final.<|end|>"
    + LOOP.replace("{{ bos_token }}", "")
    + f"{USER}<|start|>user<|message|>{{{{ m.content }}}}<|end|>{ELSE}"
    + "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    + f"{{% if loop.last %}}<|return|>{ELSE}<|end|>{FI}{FI}"
    + END
    + reply("<|start|>assistant"),
    "DeepSeek V3": LOOP
    + f"{USER}<｜User｜>{{{{ m.content }}}}{ELSE}<｜Assistant｜>{THOUGHT}<｜end▁of▁sentence｜>{FI}"
    + END
    + reply("<｜Assistant｜>"),
    "DeepSeek V3.1": LOOP
    + f"{USER}<｜User｜>{{{{ m.content }}}}{ELSE}<｜Assistant｜></think>{THOUGHT}<｜end▁of▁sentence｜>{FI}"
    + END
    + reply("<｜Assistant｜>" + unless_thinking("</think>", "<think>")),
    "DeepSeek R1": LOOP
    + f"{USER}<｜User｜>{{{{ m.content }}}}{ELSE}<｜Assistant｜>{THOUGHT}<｜end▁of▁sentence｜>{FI}"
    + END
    + reply("<｜Assistant｜><think>\n"),
    "Granite": named("<|start_of_role|>{{ m.role }}<|end_of_role|>", "<|end_of_text|>\n")
    + reply("<|start_of_role|>assistant<|end_of_role|>"),
    "Falcon": LOOP
    + f"{USER}User: {{{{ m.content }}}}\n\n{ELSE}Falcon: {{{{ m.content }}}}\n\n{FI}"
    + END
    + reply("Falcon:"),
    "Falcon 3": named("<|{{ m.role }}|>\n", "<|endoftext|>\n") + reply("<|assistant|>\n"),
    "Phi 3": named("<|{{ m.role }}|>\n", "<|end|>\n")
    + f"{{% if add_generation_prompt %}}<|assistant|>\n{ELSE}<|endoftext|>{FI}",
    "Phi 4": named("<|im_start|>{{ m.role }}<|im_sep|>", "<|im_end|>")
    + reply("<|im_start|>assistant<|im_sep|>"),
    "Command R": LOOP
    + f"<|START_OF_TURN_TOKEN|>{USER}<|USER_TOKEN|>{ELSE}<|CHATBOT_TOKEN|>{FI}"
    + "{{ m.content }}<|END_OF_TURN_TOKEN|>"
    + END
    + reply("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"),
    "Command A": LOOP
    + f"<|START_OF_TURN_TOKEN|>{USER}<|USER_TOKEN|>{{{{ m.content }}}}{ELSE}"
    + f"<|CHATBOT_TOKEN|><|START_RESPONSE|>{{{{ m.content }}}}<|END_RESPONSE|>{FI}<|END_OF_TURN_TOKEN|>"
    + END
    + "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    "LFM2.5": named("<|im_start|>{{ m.role }}\n", "<|im_end|>\n", of_replies(THOUGHT))
    + reply(ASKED),
    "Nemotron Nano 2": LOOP
    + f"{USER}<SPECIAL_11>User\n{{{{ m.content }}}}\n{ELSE}<SPECIAL_11>Assistant\n{THOUGHT}\n<SPECIAL_12>\n{FI}"
    + END
    + reply("<SPECIAL_11>Assistant\n" + unless_thinking("<think></think>", "<think>\n")),
    "Nemotron 3": named(
        "<|im_start|>{{ m.role }}\n", "<|im_end|>\n", of_replies(f"<think></think>{THOUGHT}")
    )
    + reply(ASKED + unless_thinking("<think></think>", "<think>\n")),
    "GLM 4.5": LOOP
    + f"{USER}<|user|>\n{{{{ m.content }}}}{ELSE}<|assistant|>\n<think></think>\n{THOUGHT}{FI}"
    + END
    + reply("<|assistant|>" + unless_thinking(f"{LINE}<think></think>")),
    "Alpaca": LOOP
    + f"{USER}### Instruction:\n{ELSE}### Response:\n{FI}{{{{ m.content }}}}\n\n"
    + END
    + reply("### Response:\n"),
    "Vicuna": LOOP
    + f"{USER}USER: {{{{ m.content }}}}{ELSE} ASSISTANT: {{{{ m.content }}}}</s>{FI}"
    + END
    + reply(" ASSISTANT:"),
    "Jamba": LOOP
    + f"<|bom|>{USER}<|user|> {ELSE}<|assistant|> {FI}{{{{ m.content }}}}<|eom|>"
    + END
    + reply("<|bom|><|assistant|> "),
}
"""By family; several published models share each."""
