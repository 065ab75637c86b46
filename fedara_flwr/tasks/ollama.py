"""A Modelfile for Ollama: the tokenizer's chat template in Ollama's own way of writing, so that both talk alike.

Ollama's templates are those of Go's text/template over `.Messages` and `.System`; what stands between the texts is taken from
what the tokenizer makes of a conversation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fedara_flwr.tasks.templates import ASSISTANT, SYSTEM, USER, Refused, Template

TEXTS = ("\ue000", "\ue001", "\ue002", "\ue003")  # stand for texts; of Unicode's private use, so no template has them


class _Pieces(NamedTuple):
    """What a template writes before the first question, from a question to its answer, before an answer's first letter (a
    space, or nothing), and from an answer to the next question.
    """

    first: str
    ask: str
    lead: str
    again: str


def modelfile(tokenizer: Any, base: str, system: str = "") -> str:
    """An Ollama Modelfile for the folder that it lies in.

    Args:
        base: the base model's folder of safetensors, where this one holds a LoRA adapter; '' = it holds the whole model.
        system: the system text that the model was taught with; '' = none.

    Raises:
        Refused: the template writes later turns otherwise than first ones; or the system text cannot be written down.
    """
    if '"""' in system:
        raise Refused("the system text has three quotation marks, which end one there")
    template = Template(tokenizer)
    bare = _pieces(template)
    try:
        with_system = _pieces(template, {"role": SYSTEM, "content": TEXTS[3]})
    except Refused:  # a template without a place for it
        with_system = bare
    place = _go(with_system.first).replace(TEXTS[3], "{{ $.System }}")
    body = (
        '{{ $first := true }}{{ range .Messages }}{{ if eq .Role "user" }}'
        f"{{{{ if $first }}}}{{{{ if $.System }}}}{place}{{{{ else }}}}{_go(bare.first)}{{{{ end }}}}{{{{ $first = false }}}}"
        f"{{{{ else }}}}{_go(bare.again)}{{{{ end }}}}{{{{ .Content }}}}{_go(bare.ask)}"
        f'{{{{ else if eq .Role "assistant" }}}}{_go(bare.lead)}{{{{ .Content }}}}{{{{ end }}}}{{{{ end }}}}'
    )
    ids, _ = template.answers([{"role": USER, "content": TEXTS[0]}, {"role": ASSISTANT, "content": TEXTS[1]}])
    end = tokenizer.convert_ids_to_tokens(ids[-1])
    source = [f"FROM {base}", "ADAPTER ."] if base else ["FROM ."]
    source += [f'SYSTEM """{system}"""'] if system else []
    return "\n".join([*source, f'TEMPLATE """{body}"""', f'PARAMETER stop "{end}"', "PARAMETER temperature 0", ""])


def _pieces(template: Template, *system: dict[str, str]) -> _Pieces:
    asked, answered, later, _ = TEXTS
    turns = [(USER, asked), (ASSISTANT, answered), (USER, later)]
    text = template.render([*system, *({"role": role, "content": content} for role, content in turns)], answering=True)
    try:
        first, rest = text.split(asked)
        answer, rest = rest.split(answered)
        again, ask = rest.split(later)
    except ValueError:
        raise Refused("the chat template writes a text of a conversation twice, or not at all") from None
    if not answer.startswith(ask) or answer[len(ask) :].strip():
        raise Refused("the chat template writes an answer's beginning in two ways")
    return _Pieces(first, ask, answer[len(ask) :], again)


def _go(text: str) -> str:
    """Literal text in a template of Go's within three quotation marks."""
    return text.replace("{{", '{{ "{{" }}').replace('"""', '{{ "\\"\\"\\"" }}')
