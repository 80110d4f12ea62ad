"""What the site needs beyond mkdocs: hooks of mkdocs.yml, and the extension of griffe, which reads the docstrings."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# What pages link to beside each other. Each file keeps its path in the repository, so that links hold in both places.
LINKED = ("LICENSE", "docs/*.svg", "bench/results/**/*.*", "examples/**/*.*", "cpp/include/**/*.h")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make pages of the repository's Markdown files, and one of each module of the API that mkdocs.yml names."""
    root = Path(config.docs_dir).parent
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = ("*.md", *(f"{folder}/**/*.md" for folder in ("docs", "cuda", "bench", "examples")))
    for path in sorted({path for pattern in (*pages, *LINKED) for path in root.glob(pattern) if path.is_file()}):
        files.append(File.generated(config, path.relative_to(root).as_posix(), abs_src_path=str(path)))
    (modules,) = (entry["API reference"] for entry in config.nav if "API reference" in entry)
    for page in modules:
        files.append(File.generated(config, page, content=f"# {Path(page).stem}\n\n::: {Path(page).stem}\n"))
    return files


class Docstrings(griffe.Extension):
    """Adapt what griffe has read to this package."""

    def on_class_members(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Hide the special methods, which Python calls, except for the constructor."""
        for name in [name for name in cls.members if name.startswith("__") and name != "__init__"]:
            del cls.members[name]

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Split lines that describe several arguments, as in `format, blocksize: ...`."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^ {4}(\w+(?:, \w+)+): (.*(?:\n {8}.*)*)$",
                lambda group: "\n".join(f"    {name}: {group[2]}" for name in group[1].split(", ")),
                obj.docstring.value,
                flags=re.MULTILINE,
            )
