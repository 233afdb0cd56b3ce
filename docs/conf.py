"""The documentation's site: `make docs` builds the repository's own Markdown files with Sphinx."""

project = "lightning_local"
author = "The lightning_local authors"
copyright = "The lightning_local authors, Apache License 2.0"

# Sources are read from the root of the repository, so that
# links between files are the same here and in a checkout.
root_doc = "README"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "benchmarks/**/*.md",
    "examples/**/*.md",
]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3

autodoc_typehints = "none"  # shapes and units are in the text, types in the signature
autodoc_member_order = "bysource"
default_role = "code"  # docstrings write `name`
highlight_language = "none"  # blocks without a language are drawings

html_theme = "furo"
html_title = "lightning_local"
html_static_path = ["site"]
html_css_files = ["site.css"]
templates_path = ["site"]
html_additional_pages = {"index": "front.html"}
html_copy_source = False

_CONTENTS = """
```{{toctree}}
:hidden:
:caption: {caption}

{pages}
```
"""
_PARTS = {
    "Use it": [
        "docs/getting-started",
        "docs/methods",
        "docs/lightning",
        "docs/networks",
        "docs/memory",
        "docs/parallel",
        "docs/faq",
    ],
    "Go further": ["docs/extending", "docs/results", "docs/api"],
    "Examples and benchmarks": [
        "examples/image_classification/README",
        "benchmarks/accuracy/README",
        "benchmarks/step_time/README",
        "benchmarks/methods/README",
        "benchmarks/memory/README",
        "benchmarks/memory/CHECK",
        "benchmarks/memory/BREAKDOWN",
        "benchmarks/memory/CUDA",
        "benchmarks/recompute/README",
        "benchmarks/parallel/README",
        "benchmarks/logging/README",
        "benchmarks/soak/README",
        "benchmarks/sgr_weight/README",
    ],
    "Project": ["CHANGELOG", "CONTRIBUTING"],
}


def _add_contents(app, docname, source):
    """Puts the table of contents behind the README, which shows none elsewhere."""
    if docname == root_doc:
        parts = (_CONTENTS.format(caption=k, pages="\n".join(v)) for k, v in _PARTS.items())
        source[0] += "\n".join(parts)


def setup(app):
    """Called by Sphinx."""
    app.connect("source-read", _add_contents)
