"""Renders every template beside this file as transformers' apply_chat_template does, with jinja2 alone, into expected.json.

    pip install jinja2; python make_expected.py
"""
import json
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """The mark of what an assistant said; its text is its body's."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def refuse(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols])
env.filters["tojson"] = tojson
env.globals["raise_exception"] = refuse
# The tests put the day in its place.
env.globals["strftime_now"] = lambda format: f"@{format}@"


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = [
    conversation(("user", "What is the capital of France?")),
    conversation(("system", "Answer like a pirate."), ("user", " Hello! ")),
    conversation(("user", "1 + 1?"), ("assistant", "<think>\nEasy.\n</think>\n\n2 "), ("user", "And é < \"2\" & 'x'?\nSay it\tslowly: 猫🙂")),
    conversation(("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "<|im_end|>e</s>")),
    conversation(("user", "a"), ("user", "b")),
    conversation(("user", ""), ("assistant", "")),
]

cases = []
for path in sorted(Path(__file__).parent.glob("*.jinja")):
    template = env.from_string(path.read_text())
    for messages in CONVERSATIONS:
        for add_generation_prompt in [True, False]:
            case = {"template": path.name, "messages": messages, "add_generation_prompt": add_generation_prompt}
            try:
                case["text"] = template.render(
                    messages=messages, add_generation_prompt=add_generation_prompt, bos_token="<s>", eos_token="</s>", tools=None, documents=None
                )
            except jinja2.exceptions.TemplateError as error:
                case["error"] = str(error)
            cases.append(case)
Path(__file__).with_name("expected.json").write_text(json.dumps(cases, indent=1, ensure_ascii=False) + "\n")
