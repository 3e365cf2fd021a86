"""Makes a page and a notebook of each program in `examples/`, when the site is built."""

from pathlib import Path

import jupytext
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbformat import NotebookNode

EXAMPLES = Path(__file__).parents[1] / "examples"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds `examples/NAME.md` and `examples/NAME.ipynb` to the files of the site."""
    for path in sorted(EXAMPLES.glob("*.py")):
        notebook = read(path)
        contents = {"ipynb": jupytext.writes(notebook, fmt="ipynb"), "md": page(notebook, path)}
        for suffix, content in contents.items():
            uri = f"examples/{path.stem}.{suffix}"
            files.append(File.generated(config, uri, content=content))
    return files


def read(path: Path) -> NotebookNode:
    """The notebook that a program in percent format is, for any Python kernel."""
    notebook = jupytext.read(path)
    notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return notebook


def page(notebook: NotebookNode, path: Path) -> str:
    """Its cells as a page, with what it draws below."""
    first, *others = notebook.cells
    parts = [first.source, f"`python examples/{path.name}`, or [the notebook]({path.stem}.ipynb)."]
    for cell in others:
        is_code = cell.cell_type == "code"
        parts.append(f"```python\n{cell.source}\n```" if is_code else cell.source)
    parts.append(f"![What it draws](../images/examples/{path.stem}.png)")
    return "\n\n".join(parts) + "\n"
