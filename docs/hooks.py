"""What MkDocs does beside: links that leave this folder, references in docstrings, help of the command line."""

import argparse
import os
import posixpath
import re
from unittest import mock

import griffe

import hf_normswap
from hf_normswap.cli import _make_parser


LINK = re.compile(r"(?<!!)\[([^\]\[]*)\]\(((?:\.\./)+[^)#\s]*)(?:#[^)\s]*)?\)")
# What docstrings in the style of Hugging Face refer with: [`name`], [`~path.name`] and [`name`](hf_normswap.name).
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?:\((hf_normswap\.[\w.]+)\))?")
# `name (`type`, *optional*): text`, where signatures have the type and the default, and often not the shape.
ARGUMENT = re.compile(
    r"^( +[\w, *]+?) \(((?:\[?`|\*optional\*|list of ).*)\):(?=\s)", re.MULTILINE
)
RETURNED = re.compile(r"^(Returns:\n +)\[?`~?([\w.\[\], ]+)`\]?: ", re.MULTILINE)
HELP = re.compile(r"^<!-- help (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown, page, **kwargs):
    """Say the path where a link leaves the documentation, and fill in the help of each verb."""
    folder = posixpath.dirname(page.file.src_uri)

    def path_in_place_of_link(match):
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if path.startswith("docs/"):
            return match[0]
        return f"`{path}`" if text.startswith("`") else f"{text} in `{path}`"

    markdown = LINK.sub(path_in_place_of_link, markdown)
    return HELP.sub(lambda match: f"```text\n{help_of(match[1])}```", markdown)


def help_of(verb):
    """The help of a verb of the command line."""
    parser = _make_parser()
    (verbs,) = (
        action
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    with mock.patch.dict(os.environ, COLUMNS="88"):
        return verbs.choices[verb].format_help()


class HuggingFaceStyle(griffe.Extension):
    """Reads docstrings in the style of Hugging Face as those of Google.

    References become links where the object is documented, and code elsewhere.
    """

    def on_object(self, *, obj, **kwargs):
        if obj.docstring:
            text = RETURNED.sub(r"\1\2: ", obj.docstring.value)
            text = ARGUMENT.sub(
                lambda match: f"{_one_name(match[1])}: {_shape(match[2])}", text
            )
            obj.docstring.value = REFERENCE.sub(_link, text)


def _one_name(names):
    """Several names of one line in a form that Griffe takes for one."""
    return names.replace(", ", ",\N{NO-BREAK SPACE}")


def _shape(type_):
    return (
        f"{type_.partition(', *optional*')[0]}."
        if "shape" in type_ or "leading" in type_
        else ""
    )


def _link(match):
    tilde, name, target = match.groups()
    first, _, rest = (target or name).removeprefix("hf_normswap.").partition(".")
    path = f"hf_normswap.{first}"
    if first in hf_normswap.__all__:
        path = f"{getattr(hf_normswap, first).__module__}.{first}"
    path += f".{rest}" if rest else ""
    shown = name.rpartition(".")[2] if tilde else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
