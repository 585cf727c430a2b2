"""What the language model reads: the user's template, and the tokens of a chat template."""

import dataclasses
import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ragjax.data import Passage, PromptTemplate, passage_text
from ragjax.models.files.chat import ChatTemplate
from ragjax.models.language_model import PromptText
from ragjax.models.testing import tiny_language_model
from ragjax.runs.compare.answers import answer_limits
from ragjax.runs.options.prompt import (
    PromptConfig,
    parse_template,
    read_template,
    without_document,
)
from ragjax.runs.prompts.text import chat_text, read_kept, usual_text, with_prompt
from ragjax.runs.tokens import answer_end_id, make_prompts, training_prompts

RA_DIT = "Background: {document}\n\nQ: {question} A: {answer}"
CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LOOP = "{% for m in messages %}"
CHATS = {
    "chatml": LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "bos and space": "{{ bos_token }}" + LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }}"
    " [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}",
    "two breaks": "{{ bos_token }}" + LOOP + "<|im_start|>{{ m.role }}\n\n{{ m.content | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}",
}  # fmt: skip
TEXT = "The café: in Paris.\nIt <|im_end|>has 5 rooms, a bar and a garden </s> with a lawn"


def byte_level():
    made = Tokenizer(models.BPE())
    # As Llama 3 and Qwen cut: two line breaks are one token, whatever follows.
    words = pre_tokenizers.Split(
        Regex(r"[^\s\p{L}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n+|\s+(?!\S)|\s"), "isolated"
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    made.decoder = decoders.ByteLevel()
    return made, pre_tokenizers.ByteLevel.alphabet()


def sentence_piece():
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Replace("▁", " ")
    return made, []


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=["bytes", "pieces"])
def tokenizer(request):
    made, alphabet = request.param()
    corpus = [TEXT, "user\nassistant\n\nQuestion: Where is it?\nAnswer: in [INST] [/INST]\n\n"] * 9
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=CONTROL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(corpus, trainer)
    return made


def model_of(tokenizer, chat="", *, bos=True):
    tokens = (("bos_token", "<s>"), ("eos_token", "</s>"))
    return dataclasses.replace(
        tiny_language_model(),
        tokenizer=tokenizer,
        bos_id=1 if bos else None,
        eos_ids=(2,),
        chat=ChatTemplate(CHATS[chat], tokens) if chat else None,
    )


# --- a template of the user's ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "closed_book", "answer"),
    [
        (RA_DIT, "Q: {question} A: ", "{answer}"),
        ("{document}\n\nQuestion: {question}\nAnswer:", "Question: {question}\nAnswer:",
         " {answer}"),
        ("Use it.\n\nText: {document}\n\n{question}\n", "Use it.\n\n{question}\n", "{answer}"),
        ("{document} {question}", "{question}", " {answer}"),
        ("{question}\n\n{document}\nA:", "{question}\n\n\nA:", " {answer}"),
    ],
)  # fmt: skip
def test_a_template_without_its_document_is_the_closed_book_prompt(text, closed_book, answer):
    template = parse_template(text, "template")
    assert template.context == text.removesuffix("{answer}")
    assert (without_document(template.context), template.answer) == (closed_book, answer)


@pytest.mark.parametrize(
    ("text", "closed_book"),
    [
        ("<s>{document}\n\nQ: {question}", "<s>Q: {question}"),
        ("<s>[INST] {document}\n\nQ: {question} [/INST]", "<s>[INST] Q: {question} [/INST]"),
        ("<|im_start|>user\nText: {document}\n\n{question}<|im_end|>\n",
         "<|im_start|>user\n{question}<|im_end|>\n"),
        ("<|im_start|>user\nUse it.\n\nText: {document}\n\n{question}<|im_end|>",
         "<|im_start|>user\nUse it.\n\n{question}<|im_end|>"),
        ("<|im_start|>system\n{document}<|im_end|>\n\n<|im_start|>user\n{question}<|im_end|>",
         "<|im_start|>system\n<|im_end|>\n\n<|im_start|>user\n{question}<|im_end|>"),
    ],
)  # fmt: skip
def test_without_its_document_a_template_keeps_its_control_tokens(tokenizer, text, closed_book):
    lm = with_prompt(model_of(tokenizer), PromptConfig(), parse_template(text, ""))
    assert lm.prompt.closed_book == closed_book
    # One <s> before every text, written or put there.
    assert make_prompts(PromptConfig(), lm).context("Where?").count(1) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\n{passages} {question}", r"line 2 has \{passages\}, and the places are \{document\}"),
        ("{document}: {answer}", r"must hold \{question\} exactly once, got '\{document\}: "),
        ("{question} {document} {document}", r"must hold \{document\} exactly once"),
        ("{document} {question} {answer} {answer}", r"must hold \{answer\} at most once"),
        ("{answer} {document} {question}", r"must hold \{answer\} behind all else"),
    ],
)
def test_a_template_that_cannot_be_used_says_why(tmp_path, text, message):
    with pytest.raises(ValueError, match=f"^template:? .*{message}"):
        PromptConfig(template=text)
    path = tmp_path / "template.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^--prompt.template .*template.txt:? .*{message}"):
        read_template(PromptConfig(template=str(path)))


def test_a_template_comes_from_a_text_or_a_file(tmp_path):
    path = tmp_path / "template.txt"
    path.write_bytes(b"\xef\xbb\xbf" + RA_DIT.replace("\n", "\r\n").encode() + b"\r\n")
    of_file = read_template(PromptConfig(template=str(path)))
    shell = read_template(PromptConfig(template=RA_DIT.replace("\n", "\\n")))
    assert of_file == shell == parse_template(RA_DIT, "") and read_template(PromptConfig()) is None
    with pytest.raises(ValueError, match="template no.txt: neither a text with {document} and"):
        read_template(PromptConfig(template="no.txt"))


def test_a_template_is_read_in_place_of_what_the_model_was_trained_with(tokenizer):
    own = PromptText("{document} // {question}", "{question}", "{answer}", "{title} / {text}")
    lm = dataclasses.replace(model_of(tokenizer), prompt=own)
    assert with_prompt(lm, PromptConfig(), None).prompt == own
    given = with_prompt(lm, PromptConfig(), parse_template(RA_DIT, "")).prompt
    assert given.context == "Background: {document}\n\nQ: {question} A: "
    assert given.passage == own.passage and given.end == ""
    builder = make_prompts(PromptConfig(), dataclasses.replace(lm, prompt=given))
    (document,) = builder.encode_documents(["in Paris"]).ids
    whole = "Background: in Paris\n\nQ: Where is it? A: a bar"
    ids = [*builder.context("Where is it?", [document]), *builder.answer_ids("a bar")]
    assert ids == [1, *tokenizer.encode(whole, add_special_tokens=False).ids]
    closed = builder.context("Where is it?")
    assert tokenizer.decode(closed).strip() == "Q: Where is it? A:"


def test_control_tokens_of_a_template_end_answers_and_begin_texts(tokenizer):
    text = "<s>{document}\n\n{question}\n{answer}<|im_end|>"
    lm = model_of(tokenizer)
    lm = with_prompt(lm, PromptConfig(), parse_template(text, ""))
    builder = training_prompts(PromptConfig(), lm)
    assert builder.context("Where?", builder.encode_documents(["Paris"]).ids).count(1) == 1
    assert builder.target("a bar")[-1] == answer_end_id(lm) == CONTROL.index("<|im_end|>")
    with pytest.raises(ValueError, match="has '<end>' behind {answer}, which is no token of tiny"):
        with_prompt(lm, PromptConfig(), parse_template(RA_DIT + "<end>", ""))


# --- the chat template of the model ---------------------------------------------------------------


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", ["", "Background: {document}\n\nQ: {question}"])
@pytest.mark.parametrize("chat", CHATS)
def test_the_tokens_are_those_that_transformers_makes(tokenizer, chat, template, bos):
    lm = model_of(tokenizer, chat, bos=bos)
    config = PromptConfig(template=template, chat="on")
    lm = with_prompt(lm, config, read_template(config))
    scoring, training = make_prompts(config, lm), training_prompts(config, lm)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHATS[chat]
    )
    form = template or "{document}\n\nQuestion: {question}\nAnswer:"
    # Spelled out in a passage, control tokens are characters.
    passage = TEXT.replace("<|im_end|>", "").replace("</s> ", "")
    (document,) = scoring.encode_documents([passage]).ids
    for documents, said in ((["x"], form), ([], form.partition("\n\n")[2])):
        said = said.replace("{document}", passage).replace("{question}", "Where is it?")
        talk = [{"role": "user", "content": said}]
        expected = theirs.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
        context = scoring.context("Where is it?", [document] if documents else [])
        assert (
            context == expected == training.context("Where is it?", [document] if documents else [])
        )
        answered = [*talk, {"role": "assistant", "content": "a bar"}]
        whole = theirs.apply_chat_template(answered)["input_ids"]
        target = training.target("a bar")
        assert [*context, *target[:-1]] == whole[: len(context) + len(target) - 1]
    assert scoring.target("a bar") == target[:-1]
    assert target[-1] == answer_end_id(lm) in answer_limits(lm, 8).stop_ids
    (hostile,) = scoring.encode_documents([TEXT]).ids
    control = set(range(1, len(CONTROL)))
    found = [token for token in scoring.context("</s>?", [hostile]) if token in control]
    assert found == [token for token in expected if token in control]


@pytest.mark.parametrize("chat", CHATS)
def test_places_in_a_chat_are_those_of_the_whole_text(tokenizer, chat):
    lm = with_prompt(model_of(tokenizer, chat), PromptConfig(chat="on"), None)
    builder = make_prompts(PromptConfig(document_tokens=12), lm)
    (document,) = builder.encode_documents([TEXT]).ids
    context = builder.context("Where is it?", [document])
    place = builder.document_place("Where is it?", document)
    read = context[place.start : place.start + len(place.characters)]
    # Whose pieces go across words, shares a token with what stands beside it.
    assert document.text in tokenizer.decode(read, skip_special_tokens=False)
    start, end = builder.question_place("Where is it?", document)
    assert "Where is it?" in tokenizer.decode(context[start:end])
    assert "Where" not in tokenizer.decode(context[start + 3 : end])


def test_what_no_chat_can_be_made_of_says_why(tokenizer):
    plain = model_of(tokenizer)
    with pytest.raises(ValueError, match="--prompt.chat on: tiny llama.* has no chat template; le"):
        with_prompt(plain, PromptConfig(chat="on"), None)
    assert with_prompt(plain, PromptConfig(chat="auto"), None).prompt is None
    given = parse_template("<|im_start|>{document}\n\n{question}", "")
    lm = with_prompt(model_of(tokenizer, "chatml"), PromptConfig(), given)
    with pytest.raises(ValueError, match="the template writes '<|im_start|>' itself"):
        chat_text(lm)
    broken = dataclasses.replace(lm, prompt=None, chat=ChatTemplate("{{ x.y.z }}", ()))
    with pytest.raises(ValueError, match="tiny llama.*the chat template cannot be rendered"):
        chat_text(broken)


# --- what a run has chosen ------------------------------------------------------------------------


def test_what_a_run_has_chosen_is_read_whatever_the_options_say(tokenizer, tmp_path):
    lm = model_of(tokenizer, "chatml")
    for text in (None, chat_text(lm)):
        kept = {"chat": bool(text), "reason": "r", "text": text and text._asdict()}
        (tmp_path / "prompt.json").write_text(json.dumps(kept))
        given = parse_template(RA_DIT, "")
        assert with_prompt(lm, PromptConfig(chat="off"), given, tmp_path).prompt == text
    assert read_kept(tmp_path / "elsewhere") is None


@pytest.mark.parametrize("content", ["{", "[]", '{"text": {"other": ""}, "reason": ""}', "{}"])
def test_a_damaged_choice_is_named(tokenizer, tmp_path, content):
    (tmp_path / "prompt.json").write_text(content)
    with pytest.raises(ValueError, match="prompt.json is damaged .* put the file back"):
        with_prompt(model_of(tokenizer), PromptConfig(), None, tmp_path)


def test_the_usual_text_is_that_of_a_template():
    assert {**usual_text()._asdict(), "end": None}.items() >= {
        name: getattr(PromptTemplate(), name)
        for name in ("context", "closed_book", "answer", "passage", "whole")
    }.items()
    assert passage_text(Passage("id", "Title", "Text"), usual_text().passage) == "Title\nText"
