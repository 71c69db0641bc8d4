"""The site: `python -m sphinx -W -b html docs docs/_build`. It needs no network."""

import pathlib
import re
import shutil

import latex2mathml.converter
from docutils import nodes

import clipfx

ROOT = pathlib.Path(__file__).parents[1]
# Pages of the site whose text is a file elsewhere in the repository.
ELSEWHERE = {
    "results": "benchmarks/RESULTS.md",
    "contributing": "BUILD.md",
    "changelog": "clipfx/CHANGELOG.md",
}
# Notebooks as they were saved; Sphinx must find a file of that name.
NOTEBOOKS = {
    f"notebooks/{x.stem}": f"colabs/{x.name}" for x in ROOT.glob("colabs/*.ipynb")
}
ELSEWHERE |= NOTEBOOKS

project = "clipfx"
author = "The clipfx authors"
copyright = author
version = release = clipfx.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4  # as GitHub names them

default_role = "py:obj"  # `clip_by_norm` is a link where it is a name, else code
autodoc_typehints = "none"  # the text says what arguments are
autodoc_member_order = "alphabetical"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "furo"
html_title = f"clipfx {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"
highlight_language = "none"  # of blocks that name none, as tables of numbers
pygments_dark_style = "github-dark"


def bold_leads(app, what, name, obj, options, lines):
    """Sets "Reference:" and "Differs from the source:" apart from what follows."""
    lead = re.compile(r"^(Reference|Differs from the source):")
    lines[:] = [lead.sub(r"**\1:**", line) for line in lines]


def skip_fields(app, what, name, obj, skip, options):
    """Fields of a NamedTuple are described by its docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def copy_notebooks(app):
    """Puts notebooks where Sphinx finds them."""
    for page, text in NOTEBOOKS.items():
        file = pathlib.Path(app.srcdir, f"{page}.ipynb")
        file.parent.mkdir(exist_ok=True)
        shutil.copy2(ROOT / text, file)


def read_elsewhere(app, name, source):
    """Takes the text from where it is, and leads links to pages of the site."""
    path = pathlib.Path(app.srcdir, f"{name}.md")
    if name in ELSEWHERE:
        path = ROOT / ELSEWHERE[name]
        app.env.note_dependency(str(path))
        source[0] = path.read_text()
    pages = {
        (ROOT / text).resolve(): page + pathlib.Path(text).suffix
        for page, text in ELSEWHERE.items()
    }

    def lead(match):
        text, target, anchor = match.groups()
        file = (path.parent / target).resolve()
        if file in pages:
            return f"[{text}](/{pages[file]}{anchor or ''})"
        if file.is_relative_to(ROOT / "docs"):
            return f"[{text}](/{file.relative_to(ROOT / 'docs')}{anchor or ''})"
        return text  # a file of the repository, which the site has not

    link = r"(?<!!)\[([^\]]+)\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)"
    source[0] = re.sub(link, lead, source[0])


def link_names(app, doctree, page):
    """Leads code that begins with a public name, as `zclip()` does, to that name."""
    known = app.env.domains["py"].objects
    for code in list(doctree.findall(nodes.literal)):
        name = re.match(r"(?:clipfx\.)?([\w.]*\w)", code.astext())
        names = [f"clipfx.{x}{name[1]}" for x in ("", "states.")] if name else []
        found = next((known[x] for x in names if x in known), None)
        if found and not isinstance(code.parent, nodes.reference | nodes.title):
            uri = app.builder.get_relative_uri(page, found.docname)
            link = nodes.reference("", "", internal=True)
            link["refuri"] = f"{uri}#{found.node_id}"
            code.replace_self(link)
            link += code


def math(display):
    """Mathematics as MathML, which browsers set without a script."""

    def visit(self, node):
        text = latex2mathml.converter.convert(node.astext(), display=display)
        self.body.append(f'<span class="math {display}">{text}</span>')
        raise nodes.SkipNode

    return visit, None


def setup(app):
    """What Sphinx calls."""
    app.add_html_math_renderer("mathml", math("inline"), math("block"))
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", read_elsewhere)
    app.connect("doctree-resolved", link_names)
    app.connect("autodoc-process-docstring", bold_leads)
    app.connect("autodoc-skip-member", skip_fields)
