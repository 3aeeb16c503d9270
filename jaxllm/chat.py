"""Chat templates of checkpoints, rendered where they can do no harm.

A template is a small program that comes with the weights, in Jinja. It is rendered
in Jinja's sandbox, which keeps it from Python, by a process of its own, which keeps
it from this one's memory and time: `{% for %}` and `*` need no Python to be endless.
"""

import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# Templates of published models take milliseconds and render a few thousand characters
# around the messages. The address space is that of a Python with Jinja, and as much.
_TIMEOUT_S = 10.0
_CPU_S = 5
_MEMORY_BYTES = 512 * 2**20
_MAX_CHARS = 2**22

_Messages = Sequence[Mapping[str, str]]


def render(
    template: str, conversations: Sequence[_Messages], names: Mapping[str, str]
) -> list[str]:
    """Returns the text of every conversation, up to where the model shall answer.

    Args:
      template: as the checkpoint has it.
      conversations: each a list of messages with `role` and `content`.
      names: further variables, such as `bos_token`.

    Raises:
      ValueError: the template cannot be read, refuses the messages, or takes more
        time, memory or room than a template needs.
    """
    asked = json.dumps([template, [list(map(dict, c)) for c in conversations], names])
    serve = f"import runpy; runpy.run_path({str(pathlib.Path(__file__))!r})['serve']()"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", serve],
            input=asked.encode(),
            capture_output=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(_endless(f"{_TIMEOUT_S:g} seconds")) from None
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        limits = f"{_CPU_S} seconds or {_MEMORY_BYTES // 2**20} MiB"
        raise ValueError(_endless(limits)) from None
    if "error" in answer:
        raise ValueError(
            f"the chat template of the checkpoint cannot be rendered:"
            f" {answer['error']}. Every checkpoint says how its messages are written."
            " Correct the template, or give plain prompts with --nochat."
        )
    return answer["texts"]


def _endless(limit: str) -> str:
    return (
        f"the chat template of the checkpoint was stopped after {limit}. Templates of"
        " published models take milliseconds. Do not trust this file; or give plain"
        " prompts with --nochat."
    )


def serve() -> None:
    """Renders what stands on stdin; the whole of a process of its own."""
    # Imported here, for this file is also run without a package around it.
    import datetime
    import resource

    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template, conversations, names = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # As the templates of Hugging Face checkpoints expect it; see "Chat templates" at
    # https://huggingface.co/docs/transformers/chat_templating_writing.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    answer: dict[str, Any]
    try:
        compiled = environment.from_string(template)
        texts = [
            _bounded(
                compiled.generate(
                    messages=messages,
                    add_generation_prompt=True,
                    tools=None,
                    documents=None,
                    **names,
                )
            )
            for messages in conversations
        ]
        answer = {"texts": texts}
    except MemoryError:
        return  # As when the machine stops it: no answer.
    except Exception as error:  # Whatever a template does, it is the template's.
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(answer))


def _bounded(pieces: Any) -> str:
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > _MAX_CHARS:
            raise ValueError(f"it makes more than {_MAX_CHARS} characters")
    return text
