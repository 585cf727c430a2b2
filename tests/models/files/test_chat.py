"""Chat templates are read from folders and GGUF metadata, and rendered as transformers does."""

import json
from pathlib import Path

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ragjax.models.files.chat import ChatTemplate, read_chat_template, render_turn
from ragjax.models.files.gguf.tokenizer import chat_template

TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
LOOP = "{% for m in messages %}"
TEMPLATES = {
    "chatml": (
        LOOP
        + "{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>"
        "\n{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama 2": (
        "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
        "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}" + LOOP + "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<|im_start|>' + role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
    ),
    "thinks": (
        LOOP + "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}"
        "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
        "<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "marks answers": (
        LOOP
        + "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}"
        "{% else %}Q: {{ m.content }}\nA: {% endif %}{% endfor %}"
    ),
    "no turn of its own": LOOP + "{{ m.role | upper }}: {{ m.content }}\n{% endfor %}",
}
ANSWER = {
    "chatml": ("", "<|im_end|>\n"),
    "llama 2": (" ", " </s>"),
    "gemma": ("", "<|im_end|>\n"),
    "thinks": ("", "<|im_end|>\n"),
    "marks answers": ("", "</s>"),
    "no turn of its own": ("", "\n"),
}


def rendered(source, *said, **options):
    """What transformers makes of a conversation."""
    roles = ("user", "assistant")
    talk = [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]
    options |= {"enable_thinking": False, **dict(TOKENS)}
    (text,), _ = render_jinja_template([talk], chat_template=source, **options)
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_turn_is_what_transformers_renders(name):
    source, asked = TEMPLATES[name], "Where is <s>\n\nit?"
    turn = render_turn(ChatTemplate(source, TOKENS))
    prompt = rendered(source, asked, add_generation_prompt=True)
    whole = turn.before + asked + turn.between + turn.space + "Here" + turn.behind
    assert rendered(source, asked, "Here") == whole
    assert (turn.space, turn.behind) == ANSWER[name]
    # A template that begins no turn leaves that to the model, which would write the same each time.
    assert whole.startswith(prompt)
    assert (turn.before + asked + turn.between == prompt) == (name != "no turn of its own")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "cannot be rendered"),
        ("{{ raise_exception('roles must alternate') }}", "rendered .roles must alternate"),
        ("{{ messages[7].content }}", "cannot be rendered"),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content }}", "cannot be rendered .*unsafe"),
        ("nothing is said", "writes a question 0 times"),
        ("{{ messages[0].content }}{{ messages[0].content }}", "writes a question 2 times"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(source, message):
    with pytest.raises(ValueError, match=message):
        render_turn(ChatTemplate(source, ()))


def test_every_day_has_the_same_prompt():
    source = "{{ strftime_now('%d %B %Y') }}: {{ messages[0].content }}"
    assert render_turn(ChatTemplate(source, ())).before == "26 July 2024: "


def folder_with(folder: Path, template, jinja=""):
    settings = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')
    if jinja:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


@pytest.mark.parametrize(
    ("template", "jinja", "found"),
    [
        ("a", "", "a"),
        ("a", "b", "b"),  # transformers 5 writes the file
        ([{"name": "default", "template": "c"}, {"name": "tool_use", "template": "d"}], "", "c"),
        ([{"name": "tool_use", "template": "d"}], "", None),
        (None, "", None),
    ],
)
def test_a_folder_declares_its_template_and_tokens(tmp_path, template, jinja, found):
    chat = read_chat_template(folder_with(tmp_path, template, jinja))
    tokens = (("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"))
    assert chat == (None if found is None else ChatTemplate(found, tokens))


def test_a_gguf_file_declares_them_too():
    fields = {"tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"], "tokenizer.chat_template": "a"}
    fields |= {f"tokenizer.ggml.{n}_token_id": i for i, n in enumerate(("unknown", "bos", "eos"))}
    assert chat_template(Path("x.gguf"), fields) == ChatTemplate(
        "a", (("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>"))
    )
    assert chat_template(Path("x.gguf"), fields | {"tokenizer.chat_template": ""}) is None
    with pytest.raises(ValueError, match="eos_token_id is 7, not an id of 3 tokens"):
        chat_template(Path("x.gguf"), fields | {"tokenizer.ggml.eos_token_id": 7})
