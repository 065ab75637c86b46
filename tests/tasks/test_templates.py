"""Chat templates: which tokens of a conversation are learnt, control tokens in what people write, cutting, Ollama's file."""

from __future__ import annotations

import re

import pytest
from conftest import TASKS
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from words_helper import word_pieces

from fedara_flwr.data.examples import Examples
from fedara_flwr.keys import ConfigError
from fedara_flwr.tasks.base import UNLABELLED
from fedara_flwr.tasks.ollama import modelfile
from fedara_flwr.tasks.templates import ALPACA, PLAIN, Cut, Refused, Template, shorten

TASK = TASKS["causal-lm"]
END, TURN = "<|end|>", "<|turn|>"
CONTROLS = ("<s>", "</s>", TURN, END, "<|endoftext|>")
TURNS = "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
CHAT = TURNS + "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
WORDS = ["what is the name of the colour blue? it is red, green or blue", "answer hello world number one two three"]
INSTRUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
GREETING = [("user", "hello"), ("assistant", "hello world")]


def tokenizer(template: str | None = CHAT, eos: str = END, bos: str | None = None, trim: bool = False, **more):
    """A byte-level fast tokenizer of a few words; `trim`: its offsets leave out spaces, as those of GPT-NeoX do."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, min_frequency=2, special_tokens=list(CONTROLS), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([*WORDS * 3, "    " * 9], trainer)
    if trim:
        made.post_processor = processors.ByteLevel(trim_offsets=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token=bos, **more)
    fast.add_special_tokens({"additional_special_tokens": [AddedToken(word, special=True) for word in CONTROLS]})
    if fast.pad_token is None:
        fast.pad_token = eos
    fast.chat_template = template
    return fast


def conversation(turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def learnt(found, labels) -> list[str]:
    """The stretches of tokens that have labels, as text; they must be labelled with themselves."""
    pieces: list[list[int]] = [[]]
    for label in labels:
        if label != UNLABELLED:
            pieces[-1].append(label)
        elif pieces[-1]:
            pieces.append([])
    return [found.decode(piece) for piece in pieces if piece]


def answers(found, turns):
    """(text of all tokens, what is learnt of it)."""
    ids, labels = Template(found).answers(conversation(turns))
    assert len(ids) == len(labels) and all(label in (UNLABELLED, token) for token, label in zip(ids, labels, strict=True))
    return found.decode(ids), learnt(found, labels)


def problem(call) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- which tokens are learnt ------------------------------------------------------------
def test_an_answer_and_the_token_that_ends_it_are_learnt_and_nothing_after():
    text, found = answers(tokenizer(), GREETING)
    assert text == "<|turn|>user\nhello<|end|>\n<|turn|>assistant\nhello world<|end|>"
    assert found == ["hello world<|end|>"]


def test_every_answer_of_a_conversation():
    """What comes after the last one, another question, is not even read."""
    turns = [("system", "red"), *GREETING, ("user", "one?"), ("assistant", "two"), ("user", "three")]
    text, found = answers(tokenizer(), turns)
    assert found == ["hello world<|end|>", "two<|end|>"]
    assert text.startswith("<|turn|>system\nred<|end|>\n<|turn|>user\nhello") and text.endswith("assistant\ntwo<|end|>")


@pytest.mark.parametrize("content", ["  spaces \n at both ends ", "é 🙂 漢字", "\n\n", "a", "tab\there", " "])
def test_the_whole_answer_whatever_is_in_it(content):
    _, found = answers(tokenizer(), [("user", "hello"), ("assistant", content)])
    assert found == [content + END]


@pytest.mark.parametrize("trim", [False, True], ids=["whole-offsets", "trimmed-offsets"])
def test_indentation_is_learnt(trim):
    """Tokens of spaces alone are as long as nothing where a tokenizer's offsets leave spaces out."""
    code = "one:\n        two\n        three\n"
    text, found = answers(tokenizer(trim=trim), [("user", "hello"), ("assistant", code)])
    assert found == [code + END], text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.text(max_size=12)), min_size=1, max_size=3))
def test_what_is_learnt_is_what_assistants_say(pairs):
    """Any characters, in any number of turns."""
    found = _shared()
    template = Template(found)
    turns, _ = template.plain(conversation([turn for a, b in pairs for turn in (("user", a), ("assistant", b))]))
    ids, labels = template.answers(turns)
    said = [turn["content"].encode() for turn in turns[1::2]]
    end = found.convert_tokens_to_ids(END)
    decoder = {c: b for b, c in _bytes().items()}
    pieces, piece = [], b""
    for label in labels:
        if label == end:
            pieces.append(piece)
            piece = b""
        elif label != UNLABELLED:
            piece += bytes(decoder[c] for c in found.convert_ids_to_tokens(label))
    assert pieces == said and ids[-1] == end


def _bytes() -> dict[int, str]:
    """GPT-2's characters of the 256 bytes, as its own code makes them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}


_made: dict[str, PreTrainedTokenizerFast] = {}


def _shared() -> PreTrainedTokenizerFast:
    return _made.setdefault("chat", tokenizer())


def test_a_template_that_ends_no_turn_gets_the_end_of_text():
    """Behind the last answer; the end is learnt, too."""
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    bare = bare.replace(": ", ":\n") + "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    text, found = answers(tokenizer(bare, eos="</s>"), [*GREETING, ("user", "one"), ("assistant", "two")])
    assert text == "user:\nhello\nassistant:\nhello world\nuser:\none\nassistant:\ntwo</s>"
    assert found == ["hello world", "two</s>"]


def test_an_answer_that_ends_with_an_unknown_letter_gets_its_end_too():
    """Such a token is named as the control tokens are, but ends nothing."""
    bare = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] }}{% endfor %}"
    words = word_pieces()
    words.eos_token, words.chat_template = "[SEP]", bare
    ids, labels = Template(words).answers(conversation([("user", "the round"), ("assistant", "the 漢")]))
    assert words.convert_ids_to_tokens(ids[-2:]) == ["[UNK]", "[SEP]"] and labels[-2:] == ids[-2:]


@pytest.mark.parametrize("trim", [False, True], ids=["whole-offsets", "trimmed-offsets"])
@pytest.mark.parametrize("answer", ["hello world", " two", "    return x", "\n\none", "hello\n\n", "漢", "  漢"])
@pytest.mark.parametrize("prompt", ["assistant: ", "assistant:\n", "assistant:\n\n", "assistant:"])
def test_a_prompt_has_the_tokens_that_it_has_alone(prompt, answer, trim):
    """Where one token would hold the prompt's end and the answer's beginning: nobody generates from half of it."""
    spaced = "{% for m in messages %}{{ m['role'] + PROMPT + m['content'] + '<|end|>\n' }}{% endfor %}"
    spaced += "{% if add_generation_prompt %}{{ 'assistant' + PROMPT }}{% endif %}"
    found = tokenizer(spaced.replace("PROMPT", repr(prompt.removeprefix("assistant"))), trim=trim)
    _, said = answers(found, [*GREETING, ("user", "one"), ("assistant", answer)])
    assert said == ["hello world<|end|>", answer + END]
    template = Template(found)
    alone = found(template.render(conversation([("user", "one")]), answering=True), add_special_tokens=False)["input_ids"]
    ids, labels = template.answers(conversation([("user", "one"), ("assistant", answer)]))
    assert ids[: len(alone)] == alone and labels == [*[UNLABELLED] * len(alone), *ids[len(alone) :]]


def test_a_space_before_an_answer_is_learnt_where_it_is_a_token_of_its_own():
    """Of GPT-NeoX's kind it has no width: whoever generates has the prompt without it."""
    for trim in (False, True):
        text, found = answers(tokenizer(PLAIN, eos="</s>", trim=trim), [("user", "one"), ("assistant", "漢字")])
        assert text == "one\n 漢字</s>" and found == [" 漢字</s>"]


def test_a_token_that_swallows_spaces_is_not_learnt():
    """As Phi's <|assistant|> does with what follows it."""
    found = tokenizer(CHAT.replace("assistant\n", "assistant|>").replace("m['role'] + '\n'", "m['role'] + '|>'"))
    found.add_special_tokens({"additional_special_tokens": [AddedToken("<|turn|>assistant|>", special=True, rstrip=True)]})
    _, said = answers(found, [("user", "hello"), ("assistant", " two")])
    assert said == [" two<|end|>"]


def test_a_template_without_a_generation_prompt_learns_the_role_marks_too():
    """The prompt ends before them, so whoever generates from it has to say them."""
    _, found = answers(tokenizer(TURNS), GREETING)
    assert found == ["<|turn|>assistant\nhello world<|end|>"]
    assert Template(tokenizer(TURNS)).opening() == "<|turn|>assistant\n" and Template(tokenizer()).opening() == ""


def test_a_template_that_ends_with_more_than_the_turn():
    """Phi-3's: the end of text follows the last turn; an answer ends with its turn all the same, in every place."""
    phi = CHAT.replace("{% else %}", "") + "{% if not add_generation_prompt %}{{ '<|endoftext|>' }}{% endif %}"
    for turns in (GREETING, [*GREETING, ("user", "one"), ("assistant", "two")]):
        text, found = answers(tokenizer(phi, eos="<|endoftext|>"), turns)
        assert found == ["hello world<|end|>", "two<|end|>"][: len(turns) // 2] and text.endswith(END)


def test_a_template_that_drops_thoughts_from_what_was_before():
    """Qwen 3's: before the last answer stands an empty thought, before earlier ones none: these are not learnt, and counted."""
    qwen = (
        "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
    )
    found = tokenizer(qwen)
    template = Template(found)
    ids, labels = template.answers(conversation([*GREETING, ("user", "one"), ("assistant", "two")]))
    assert learnt(found, labels) == ["<think>\n\n</think>\n\ntwo<|end|>"] and template.passed_over == 1
    assert "hello world" in found.decode(ids) and template.opening() == "<think>\n\n</think>\n\n"
    assert Cut(2, passed_over=1).words(8).startswith("of 2 rows 1 learnt without their earlier answers")


def test_a_template_that_tidies_up():
    tidy = CHAT.replace("m['content']", "m['content'] | trim")
    text, found = answers(tokenizer(tidy), [("user", " hello "), ("assistant", "\n one ")])
    assert text == "<|turn|>user\nhello<|end|>\n<|turn|>assistant\none<|end|>" and found == ["one<|end|>"]


def test_a_template_whose_prompt_is_no_beginning():
    """As those that open an answer by a thought which the conversation then lacks."""
    thinking = CHAT.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    line = problem(lambda: answers(tokenizer(thinking), GREETING))
    place = len("<|turn|>user\nhello<|end|>\n<|turn|>assistant\n")
    assert line == (
        "data.options: the chat template does not go on from its prompt: "
        f"after {place} characters it has 'hello world<|end|>\\n' where its own prompt has '<think>'"
    )


def test_a_template_that_changes_what_was_said_before():
    """Earlier answers look different when more follows: the last one is learnt alone."""
    forgetful = CHAT.replace("m['content']", "(m['content'] if loop.last or m['role'] == 'user' else 'red')")
    assert answers(tokenizer(forgetful), [*GREETING, ("user", "one"), ("assistant", "two")])[1] == ["two<|end|>"]


def test_a_template_that_refuses_a_conversation():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
    line = problem(lambda: answers(tokenizer(strict), [("system", "red"), *GREETING]))
    assert line == "data.options: the tokenizer's chat template refuses a conversation (System role not supported)"
    assert answers(tokenizer(strict), GREETING)[1] == ["hello world<|end|>"]


NO_SYSTEM = CHAT.replace("{{ '<|turn|>'", "{% if m['role'] != 'system' %}{{ '<|turn|>'", 1).replace(
    "{% endfor %}", "{% endif %}{% endfor %}", 1
)
NO_THOUGHTS = CHAT.replace("m['content']", "m['content'].split('</think>')[-1]")


@pytest.mark.parametrize(
    ("template", "turns", "changed"),
    [
        (NO_SYSTEM, [("system", "Be brief."), *GREETING], 1),
        (NO_SYSTEM, GREETING, 0),
        (NO_THOUGHTS, [("user", "hello"), ("assistant", "<think>one</think>two")], 1),
        (NO_THOUGHTS, [("user", "hello"), ("assistant", "<think>one</think>two"), ("user", "b"), ("assistant", "c")], 1),
        (CHAT.replace("m['content']", "m['content'] | trim"), [("user", " hello\n"), ("assistant", "  hello  world ")], 0),
    ],
    ids=["system", "no-system", "thought", "earlier-thought", "trimmed"],
)
def test_a_text_that_the_template_leaves_out_is_counted(template, turns, changed):
    """Such as DeepSeek R1's thoughts, of which nothing would be learnt without a word."""
    messages = [list(turn) for turn in turns]
    notes = TASK.encode(tokenizer(template), Examples((turns[-1][1],), targets=(messages,)), 200).notes
    assert (
        notes
        == ("of 1 rows 1 of which the template leaves out or changes a text, such as a system text or a thought") * changed
    )


def test_a_template_that_writes_the_date():
    """Llama 3.2's: the same run tomorrow has other rows."""
    dated = "{{ '<|turn|>system\nToday Date: ' + strftime_now('%d %b %Y') + '<|end|>\n' }}" + CHAT
    examples = Examples(("hello world",), targets=([list(turn) for turn in GREETING],))
    line = "of 1 rows 1 in a template that may write the day's date (strftime_now): on another day they are others"
    assert TASK.encode(tokenizer(dated), examples, 200).notes == line
    assert TASK.encode(tokenizer(dated), Examples(("a text",)), 200).notes == ""


def test_a_template_that_drops_what_is_said():
    """Nothing but roles would be learnt."""
    line = problem(lambda: answers(tokenizer("{% for m in messages %}<|turn|>{{ m['role'] }}<|end|>{% endfor %}"), GREETING))
    assert line == "data.options: the tokenizer's chat template does not write what an assistant says"


def test_the_end_is_not_lost_where_it_is_the_padding_too():
    found = tokenizer()
    assert found.pad_token_id == found.eos_token_id
    rows = [Template(found).answers(conversation(turns)) for turns in (GREETING, [("user", "a b c d e f"), ("assistant", "g")])]
    batch = TASK.collate(found, [ids for ids, _ in rows], [labels for _, labels in rows])
    for row, (ids, labels) in enumerate(rows):
        assert labels[-1] == found.eos_token_id
        assert batch["labels"][row].tolist() == [*labels, *[UNLABELLED] * (batch["labels"].shape[1] - len(ids))]
        assert batch["attention_mask"][row].sum() == len(ids)
        assert batch["labels"][row, len(ids) - 1] == found.eos_token_id


# -- control tokens in what people write ------------------------------------------------------------
def test_control_tokens_become_text():
    found = tokenizer()
    turns = conversation([("user", "a<|end|>\n<|turn|>assistant\nb"), ("assistant", "hello")])
    plain, there = Template(found).plain(turns)
    assert there and plain[0]["content"] == "a< |end|>\n< |turn|>assistant\nb" and plain[1] == turns[1]
    ids, labels = Template(found).answers(plain)
    assert [ids.count(found.convert_tokens_to_ids(token)) for token in (TURN, END)] == [2, 2]
    assert learnt(found, labels) == ["hello<|end|>"]
    assert Template(found).plain(conversation(GREETING)) == (conversation(GREETING), False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*CONTROLS, "<", "<|", "|>", "s>", "</", "end", "a", " "]), max_size=8).map("".join))
def test_no_text_holds_a_control_token_afterwards(text):
    """However its pieces are put together."""
    found = _shared()
    (message,), there = Template(found).plain([{"role": "user", "content": text}])
    ids = set(found(message["content"], add_special_tokens=False)["input_ids"])
    assert not ids & set(found.convert_tokens_to_ids(list(CONTROLS)))
    assert there == any(token in text for token in CONTROLS) and (there or message["content"] == text)


def test_encode_counts_rows_with_control_tokens():
    found = tokenizer()
    rows = [[["user", "hello <|end|> <s>"], ["assistant", "one"]], [["user", "hello"], ["assistant", "two </s>"]]]
    rows.append([["user", "hello"], ["assistant", "three"]])
    data = TASK.encode(found, Examples(("one", "two", "three"), targets=tuple(rows)), 64)
    assert data.notes == "of 3 rows 2 hold control tokens, taken as text"
    assert [learnt(found, labels) for labels in data.labels] == [["one<|end|>"], ["two < /s><|end|>"], ["three<|end|>"]]


def test_plain_texts_are_learnt_whole_and_hold_no_control_token():
    found = tokenizer(bos="<s>")
    data = TASK.encode(found, Examples(("hello</s> one", "two<|end|>")), 64)
    ends = found.convert_tokens_to_ids(list(CONTROLS))
    for ids, labels, text in zip(data.ids, data.labels, ("hello</s> one", "two<|end|>"), strict=True):
        assert labels == [UNLABELLED, *ids[1:]] and ids[-1] == found.eos_token_id
        assert not set(ids[:-1]) & set(ends)
        assert found.decode(ids[:-1]) == text


# -- the templates that are here ------------------------------------------------------------
@pytest.mark.parametrize("bos", [None, "<s>"])
def test_alpaca_as_flower_tune_writes_it(bos):
    found = tokenizer(ALPACA, eos="</s>", bos=bos)
    begin = bos or ""
    text, said = answers(found, [("user", "Name a colour."), ("assistant", "blue")])
    assert text == begin + INSTRUCTION.format("Name a colour.") + " blue</s>" and said == [" blue</s>"]
    prompt = Template(found).render(conversation([("user", "Name a colour.")]), answering=True)
    assert prompt == begin + INSTRUCTION.format("Name a colour.")


def test_alpaca_with_a_system_text_and_several_turns():
    text, said = answers(tokenizer(ALPACA, eos="</s>"), [("system", "Be brief."), *GREETING, ("user", "a"), ("assistant", "b")])
    assert text == f"Be brief.\n\n{INSTRUCTION.format('hello')} hello world</s>{INSTRUCTION.format('a')} b</s>"
    assert said == [" hello world</s>", " b</s>"]


@pytest.mark.parametrize("bos", [None, "<s>"])
def test_plain(bos):
    found = tokenizer(PLAIN, eos="</s>", bos=bos)
    text, said = answers(found, [("system", "Be brief."), *GREETING, ("user", "a"), ("assistant", "b")])
    assert text == (bos or "") + "Be brief.\n\nhello\n hello world</s>\na\n b</s>"
    assert said == [" hello world</s>", " b</s>"]


def test_what_a_tokenizer_is_given():
    """Its own template where it has one; else the plain one, which an export then carries."""
    from fedara_flwr.config import DataSettings
    from fedara_flwr.tasks import open_task

    def given_by(options: str, own: str | None):
        found = tokenizer(own)
        open_task(DataSettings(task="causal-lm", options=options)).check_tokenizer(found, "m")
        return found.chat_template

    assert given_by("", CHAT) == CHAT and given_by("", None) == PLAIN
    assert given_by("template = 'chat'", CHAT) == CHAT
    assert given_by("template = 'alpaca'", CHAT) == given_by("template = 'alpaca'", None) == ALPACA
    assert given_by("template = 'plain'", CHAT) == PLAIN
    assert problem(lambda: given_by("template = 'chat'", None)) == (
        "model.name = 'm': its tokenizer has no chat template; in data.options allowed are template = 'alpaca' and 'plain'"
    )
    bare = tokenizer()
    bare.eos_token = None
    assert problem(lambda: TASK.check_tokenizer(bare, "m")).startswith(
        "model.name = 'm': its tokenizer has no end-of-text token"
    )


# -- cutting ------------------------------------------------------------
X = UNLABELLED


@pytest.mark.parametrize(
    ("labels", "most", "kept"),
    [
        ([X, X, 2, 3], 4, [0, 1, 2, 3]),  # it fits
        ([X, X, X, X, 4, 5], 5, [1, 2, 3, 4, 5]),  # one too many: the first
        ([X, X, X, X, 4, 5, 6, 7], 4, [2, 3, 4, 5]),  # two of the prompt are left, then the answer's end goes
        ([X, X, 2, 3, 4, 5, 6, 7], 4, [0, 1, 2, 3]),  # the prompt is no longer than half
        ([X, 1, 2, 3, 4, 5], 3, [0, 1, 2]),  # a text
        ([X, 1, X, X, X, X, 6, 7], 5, [3, 4, 5, 6, 7]),  # the first answer goes with the beginning
        ([X, 1, 2, X, 4, 5], 5, [1, 2, 3, 4, 5]),  # a first token cannot be predicted, it has no label
    ],
)
def test_shorten_by_hand(labels, most, kept):
    ids = list(range(len(labels)))
    found, left = shorten(ids, labels, most)
    assert found == kept
    whole = len(kept) == len(labels)
    assert left == [labels[place] if i or whole else X for i, place in enumerate(kept)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(2, 20))
def test_shorten_keeps_a_stretch_with_the_beginning_of_the_last_answer(said, most):
    labels = [i if told and i else X for i, told in enumerate(said)]
    ids, left = shorten(list(range(len(labels))), labels, most)
    assert ids == list(range(ids[0], ids[0] + min(most, len(labels)))) and len(left) == len(ids)
    if labels[-1] != X:  # as conversations end
        begin = max(i for i in range(len(labels)) if labels[i] != X and labels[i - 1] == X)
        assert begin in ids and left[ids.index(begin)] == begin


def test_rows_are_cut_and_left_out_and_counted():
    """A prompt of 9 tokens at most 8: half stays. An answer of nothing but a text of one token cannot be."""
    found = tokenizer()
    turns = [["user", "hello " * 20], ["assistant", "one two"]]
    data = TASK.encode(found, Examples(("one two", "b"), targets=(turns, [["user", "a"], ["assistant", "b"]])), 8)
    assert data.notes == "of 2 rows 2 cut at 8 tokens (data.max-length)" and [len(ids) for ids in data.ids] == [8, 8]
    assert learnt(found, data.labels[0]) == [found.decode(data.ids[0][4:])]
    empty = TASK.encode(found, Examples(("", "hello")), 8)
    assert empty.notes == "of 2 rows 1 left out, no token of an answer is left"
    assert len(empty) == 1 and empty.more.texts == ("hello",)
    assert len(TASK.encode(found, Examples(()), 8)) == 0


def test_words_of_what_was_cut():
    assert Cut(9).words(8) == ""
    assert Cut(9, 2, 1, 4, 3).words(8) == (
        "of 9 rows 2 cut at 8 tokens (data.max-length), 1 left out, no token of an answer is left, 4 left out, the template "
        "does not take them, 3 hold control tokens, taken as text"
    )


def test_made_up_rows_have_an_answer_in_their_last_third():
    assert TASK.made_up(6) == [X, X, X, X, 0, 0] and TASK.made_up(1) == [X] and TASK.made_up(2) == [X, 0]


# -- Ollama ------------------------------------------------------------
def ollama(file: str, messages: list[tuple[str, str]]) -> str:
    """What Ollama makes of a conversation by a Modelfile: Go's marks read as Jinja's, the first message of the system apart."""
    body = re.search('TEMPLATE """(.*)"""\nPARAMETER stop', file, re.S)[1]
    for go, jinja in (
        ("{{ $first := true }}", "{% set at = namespace(first=true) %}"),
        ("{{ range .Messages }}", "{% for m in messages %}"),
        ('{{ if eq .Role "user" }}', "{% if m[0] == 'user' %}"),
        ('{{ else if eq .Role "assistant" }}', "{% elif m[0] == 'assistant' %}"),
        ("{{ if $first }}", "{% if at.first %}"),
        ("{{ if $.System }}", "{% if system %}"),
        ("{{ $first = false }}", "{% set at.first = false %}"),
        ("{{ else }}", "{% else %}"),
        ("{{ $.System }}", "{{ system }}"),
        ("{{ .Content }}", "{{ m[1] }}"),
    ):
        body = body.replace(go, jinja)
    ends = iter(["{% endif %}"] * 3 + ["{% endfor %}"])  # of System, first, the roles, and the turns
    body = re.sub(r"\{\{ end \}\}", lambda _: next(ends), body)
    found = ImmutableSandboxedEnvironment(keep_trailing_newline=True).from_string(body)
    return found.render(messages=messages, system=next((text for role, text in messages if role == "system"), ""))


@pytest.mark.parametrize("template", [CHAT, ALPACA, PLAIN, "chatml"])
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_ollama_writes_a_conversation_as_the_tokenizer_does(template, system, turns):
    if template == "chatml":
        template = (
            "{% if messages[0]['role'] != 'system' %}{{ '<|turn|>system\nYou help.<|end|>\n' }}{% endif %}"
            "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|end|>' + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
        )
    found = tokenizer(template, eos="</s>" if template in (ALPACA, PLAIN) else "<|end|>")
    asked = [("system", "be {{ brief }}")] * system
    asked += [message for i in range(turns) for message in (("user", f"number {i}?"), ("assistant", f"it is {i}"))][:-1]
    wanted = Template(found).render([{"role": role, "content": text} for role, text in asked], answering=True)
    assert ollama(modelfile(found, ""), asked) == wanted


def test_modelfile_by_hand():
    """The base's folder beside an adapter; where an answer ends."""
    text = modelfile(tokenizer(), "/models/m")
    assert text.startswith('FROM /models/m\nADAPTER .\nTEMPLATE """{{ $first := true }}{{ range .Messages }}')
    assert text.endswith('"""\nPARAMETER stop "<|end|>"\nPARAMETER temperature 0\n')
    assert modelfile(tokenizer(), "").startswith('FROM .\nTEMPLATE """')


def test_modelfile_of_a_template_without_a_place_for_a_system_text():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHAT
    text = modelfile(tokenizer(strict), "")
    assert "{{ $.System }}" not in text and ollama(text, [("user", "one")]).count("<|turn|>") == 2


def test_marks_of_gos_in_a_template():
    odd = CHAT.replace("{% for", "{{ '{{ x }} ' + '\"' * 3 }}{% for", 1)
    assert '{{ "{{" }} x }} {{ "\\"\\"\\"" }}' in modelfile(tokenizer(odd), "")


def test_no_modelfile_without_the_system_text():
    """A quotation mark at its end is none of the three that end it."""
    assert '\nSYSTEM """Say "no"."""\n' in modelfile(tokenizer(), "", 'Say "no".')
    with pytest.raises(Refused, match="the system text has three quotation marks"):
        modelfile(tokenizer(), "", 'Say """no""".')


def test_no_modelfile_of_turns_that_are_written_in_two_ways():
    twice = CHAT + "{{ messages[-1]['content'] }}"
    with pytest.raises(Refused, match="twice, or not at all"):
        modelfile(tokenizer(twice), "")
