"""What the documentation site changes in pages and docstrings before it renders them; see mkdocs.yml."""

import re

import griffe


def on_page_markdown(markdown: str, *, page, config, **_) -> str:
    """Hook of MkDocs. Links from a page to a file outside docs/, such as ../examples/chat.py, lead to the repository."""
    if "/" in page.file.src_uri:  # pages in docs/api link to ../kernels.md
        return markdown
    return markdown.replace("](../", f"]({config.repo_url}/blob/main/")


class DoctestExamples(griffe.Extension):
    """Extension of griffe. It shows the section "Example:" of a docstring as code, as it does "Examples:"."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
