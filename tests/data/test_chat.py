"""Chat templates: rendered as `transformers` renders them, in a sandbox, with the spans that are learnt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lexmill.data.chat import ChatTemplate, checked
from lexmill.errors import UserError

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + "
    "message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BLOCKS = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role not in ['user', 'assistant'] %}
        {{ raise_exception('only two roles') }}
    {%- endif %}
[{{ m.role }}] {{ m.content | trim }} {{ {'n': loop.index} | tojson }}
{% endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""
TALK = [
    {"role": "user", "content": "Where is “it”?"}, {"role": "assistant", "content": "Here. \n"},
    {"role": "user", "content": "在哪里?"}, {"role": "assistant", "content": "There"},
]  # fmt: skip


def stored(directory: Path, template: object, **more: object) -> Path:
    config = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>", **more}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return directory


@pytest.mark.parametrize("template", [CHATML, BLOCKS])
@pytest.mark.parametrize("answering", [True, False])
def test_a_dialogue_is_rendered_as_transformers_does(template: str, answering: bool, tmp_path: Path) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    found = ChatTemplate.read(stored(tmp_path, template))
    assert found is not None
    [expected], _ = render_jinja_template(
        [TALK], chat_template=template, add_generation_prompt=answering, bos_token="<s>", eos_token="</s>"
    )
    assert found.render(TALK, answering=answering) == expected


def test_the_assistants_turns_are_learnt_with_their_end() -> None:
    text, spans = ChatTemplate(CHATML, {}).learnt(TALK)
    assert [text[a:b] for a, b in spans] == ["Here. \n<|im_end|>", "There<|im_end|>"]
    assert text == ChatTemplate(CHATML, {}).render(TALK, answering=False)


def test_a_turn_that_changes_later_is_refused() -> None:
    forgetful = "{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}|{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="changes a turn"):
        ChatTemplate(forgetful, {}).learnt(TALK)


def test_what_a_template_must_not_do_is_refused() -> None:
    for source in ("{{ messages.append(1) }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for %}"):
        with pytest.raises(UserError, match="chat template"):
            ChatTemplate(source, {}).render(TALK, answering=True)
    with pytest.raises(UserError, match="only two roles"):
        ChatTemplate(BLOCKS, {}).render([{"role": "system", "content": "x"}], answering=True)


def test_a_directory_may_name_several_templates_or_none(tmp_path: Path) -> None:
    assert ChatTemplate.read(tmp_path) is None
    assert ChatTemplate.read(stored(tmp_path, None)) is None
    found = ChatTemplate.read(
        stored(tmp_path, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}])
    )
    assert found is not None
    assert found.source == "y"
    (tmp_path / "chat_template.jinja").write_text("z", "utf-8")
    assert ChatTemplate.read(tmp_path) == ChatTemplate("z", {"bos_token": "<s>", "eos_token": "</s>"})


def test_turns_of_other_forms() -> None:
    assert checked([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    for wrong in ("text", [], ["x"], [{"role": "king", "content": "x"}], [{"role": "user"}]):
        with pytest.raises(UserError):
            checked(wrong)
