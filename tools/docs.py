"""Build the documentation as one site: the Markdown pages, and an API reference from the docstrings.

    python tools/docs.py [FOLDER]        (default: build/docs; it begins at index.html)

pdoc makes the reference of the installed package, and its Markdown renderer makes the pages. A page keeps its path in
the repository, so relative links stay valid; files that a page links to are rendered or copied too. The
build fails if a public name has no docstring, if a docstring leaves an argument out, if pdoc warns, or if a link of the
site leads nowhere.
"""

from __future__ import annotations

import html
import importlib
import inspect
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import links
import markdown2
import pdoc
import pdoc.doc
from jinja2 import Environment, FileSystemLoader

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "docs_templates"
# The modules that users import. These call the other modules of integrations/.
MODULES = [
    "qlora_native",
    "qlora_native.functional",
    "qlora_native.nn",
    "qlora_native.optim",
    "qlora_native.testing",
    "qlora_native.integrations",
    "qlora_native.convert.gguf",
    "qlora_native.convert.merge",
    "qlora_native.integrations.bitsandbytes",
    "qlora_native.integrations.fuse",
    "qlora_native.integrations.loftq",
    "qlora_native.integrations.peft",
    "qlora_native.integrations.transformers",
]
FIRST = [ROOT / "README.md", ROOT / "docs/README.md"]
HREF = re.compile(r'(?:href|src)="([^"]+)"')


class Markdown(markdown2.Markdown):
    """GitHub's Markdown, as far as the pages need it, with GitHub's anchors."""

    def header_id_from_text(self, text: str, prefix: str, n: int) -> str:
        """The anchor of a heading, whose text is HTML."""
        name = links.slug(html.unescape(re.sub(r"<[^>]+>", "", text)))
        self.seen = getattr(self, "seen", {})
        number = self.seen[name] = self.seen.get(name, -1) + 1
        return f"{name}-{number}" if number else name


def place(path: Path) -> Path:
    """The path in the site of a file of the repository."""
    path = path.resolve().relative_to(ROOT)
    if path.suffix != ".md":
        return path
    return path.with_name("index.html") if path.name == "README.md" else path.with_suffix(".html")


def render(page: Path, template, nav: list[tuple[Path, str]]) -> str:
    """Render a page as HTML."""

    def target(match: re.Match[str]) -> str:
        name, _, anchor = match[1].partition("#")
        if not name or links.ELSEWHERE.match(match[1]):
            return match[0]
        path = page.parent / name
        if path.suffix == ".md":
            name = str(Path(name).with_name(place(path).name))
        return match[0].replace(match[1], f"{name}#{anchor}" if anchor else name)

    markdown = Markdown(extras=["fenced-code-blocks", "header-ids", "tables", "cuddled-lists"], safe_mode=None)
    body = HREF.sub(target, markdown.convert(page.read_text(encoding="utf-8")))
    up = "../" * (len(place(page).parts) - 1)
    menu = [(up + str(place(path)), name) for path, name in nav]
    return template.render(title=title(page), body=body, up=up, nav=menu)


def title(page: Path) -> str:
    """The first heading of a page, or its name."""
    found = links.HEADING.search(page.read_text(encoding="utf-8"))
    return found[1].replace("`", "") if found else page.stem


def write_pages(site: Path) -> None:
    """Write the pages, the files that they link to, and so on."""
    template = Environment(loader=FileSystemLoader(TEMPLATES)).get_template("page.html.jinja2")
    index = [ROOT / "docs" / target for target in links.targets(FIRST[1]) if "/" not in target]
    nav = [(path, title(path)) for path in [*FIRST, *index]]
    waiting, known = [*FIRST, *index], set()
    while waiting:
        path = waiting.pop().resolve()
        if path in known or not path.is_file():
            continue
        known.add(path)
        out = site / place(path)
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".md":
            shutil.copyfile(path, out)
            continue
        out.write_text(render(path, template, nav), encoding="utf-8")
        waiting += [path.parent / target.partition("#")[0] for target in links.targets(path) if target[0] != "#"]


def without_docstring(module: pdoc.doc.Module) -> list[str]:
    """The public names of a module that have no docstring."""
    found = [] if module.docstring else [module.fullname]
    for member in module.flattened_own_members:
        if member.kind in ("class", "function") and _shown(member):
            found += [] if member.docstring.strip() else [member.fullname]
    return found


def _shown(member: pdoc.doc.Doc) -> bool:
    """Whether pdoc shows a name, which must be neither private nor a special method."""
    return not any(part.startswith("_") for part in member.qualname.split("."))


def wrong_arguments(module: ModuleType) -> list[str]:
    """The arguments that docstrings of a module leave out, and the names under "Args:" that are no arguments."""
    found = []
    for name, function, docstring in functions(module):
        sections = re.findall(r"\n(Args|Attributes):\n(.*?)(?=\n\n|$)", docstring, re.DOTALL)
        listed = {
            each: kind
            for kind, text in sections
            for names in re.findall(r"^ {4}(\w[\w, ]*):", text, re.MULTILINE)
            for each in names.split(", ")
        }
        parameters = inspect.signature(function).parameters
        found += [
            f"{name}: Args lists {each}, which is no argument"
            for each, kind in listed.items()
            if kind == "Args" and each not in parameters
        ]
        found += [
            f"{name}: Args leaves {each} out"
            for each, parameter in parameters.items()
            if each not in (*listed, "self", "cls")
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
    return found


def functions(module: ModuleType) -> Iterator[tuple[str, Callable[..., Any], str]]:
    """(name, function, docstring) of the public functions, methods and constructors of a module.

    The arguments of a constructor may be described by the class, also as attributes. A method that overrides one of
    another library is documented there.
    """
    for name in getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")]):
        member = getattr(module, name)
        if not (getattr(member, "__module__", None) or "").startswith("qlora_native"):
            continue
        if inspect.isfunction(member):
            yield name, member, inspect.getdoc(member) or ""
        for attribute, value in vars(member).items() if inspect.isclass(member) else ():
            function = value.__func__ if isinstance(value, classmethod) else value
            foreign = (base for base in member.__mro__[1:] if not base.__module__.startswith("qlora_native"))
            public = not attribute.startswith("_") and not any(hasattr(base, attribute) for base in foreign)
            if inspect.isfunction(function) and (public or attribute == "__init__"):
                docstring = inspect.getdoc(function) or ""
                if attribute == "__init__" and "\nArgs:\n" not in docstring:
                    docstring = inspect.getdoc(member) or ""
                yield f"{name}.{attribute}", function, docstring


def show_private_bases(module: ModuleType) -> None:
    """Copy the members that public classes inherit from private bases of this package, or pdoc would not show them."""
    for name in getattr(module, "__all__", ()):
        member = getattr(module, name)
        for base in member.__mro__[1:] if inspect.isclass(member) else ():
            if base.__module__.startswith("qlora_native."):
                for attribute, value in vars(base).items():
                    if attribute[0] != "_" and attribute not in vars(member):
                        setattr(member, attribute, value)


def write_reference(site: Path) -> list[str]:
    """Write the API reference, and return complaints about docstrings."""
    modules = [importlib.import_module(name) for name in MODULES]
    for module in modules:
        show_private_bases(module)
    inner = {f"qlora_native.integrations.{path.stem}" for path in Path(modules[-1].__file__).parent.glob("*.py")}
    hidden = [f"!{name}" for name in inner if name not in MODULES]
    pdoc.render.configure(docformat="google", template_directory=TEMPLATES)
    pdoc.pdoc(
        "qlora_native", "qlora_native.testing", "qlora_native.integrations", *hidden, output_directory=site / "api"
    )
    for path in (site / "api").rglob("*.html"):
        path.write_text(without_dead_links(path.read_text(encoding="utf-8")), encoding="utf-8")
    found = []
    for module in modules:
        found += [f"no docstring: {each}" for each in without_docstring(pdoc.doc.Module(module))]
        found += [f"{module.__name__}, {each}" for each in wrong_arguments(module)]
    return found


def without_dead_links(text: str) -> str:
    """Remove pdoc's links to members of other libraries' classes, which it does not show."""
    ids = set(re.findall(r'\bid="([^"]+)"', text))
    link = re.compile(r'<a href="#([^"]+)">(.*?)</a>', re.DOTALL)
    return link.sub(lambda match: match[0] if match[1] in ids else match[2], text)


def broken(site: Path) -> list[str]:
    """The broken links of the site."""
    texts = {path: path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in texts.items()}
    found = []
    for path, text in texts.items():
        for target in set(HREF.findall(text)):
            target = html.unescape(target)
            name, _, anchor = target.partition("#")
            if links.ELSEWHERE.match(target) or target.startswith("${"):  # pdoc's search makes these
                continue
            to = (path.parent / name).resolve() if name else path
            to = to / "index.html" if to.is_dir() else to
            if not to.exists() or (anchor and to in ids and anchor not in ids[to]):
                found.append(f"{path.relative_to(site)}: {target}")
    return sorted(found)


def main() -> None:
    """Run the command line."""
    site = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "build/docs").resolve()
    shutil.rmtree(site, ignore_errors=True)
    write_pages(site)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        complaints = write_reference(site)
    complaints += [str(each.message) for each in caught if "pdoc" in each.filename]
    complaints += [f"broken link: {each}" for each in broken(site)]
    if complaints:
        raise SystemExit("\n".join(complaints))
    print(f"wrote {site / 'index.html'}")


if __name__ == "__main__":
    main()
