"""`make docs`: the site in build/site, offline, with every link checked.

`python docs/site.py --api` prints docs/api.md.
Pages are docs/*.md and one made of examples/. Beside each page's HTML lies its markdown, and llms.txt lists them.
"""

import dataclasses
import html
import inspect
import json
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGES, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"


def api_markdown() -> str:
    """The page docs/api.md, from signatures and docstrings: what scripts and plugins import."""
    import skyrl.api
    import skyrl.tinker

    about = "Generated from the code, not written by hand: `python docs/site.py --api > docs/api.md`."
    lines = ["# Python", "", about, "Importing these names imports no torch.", ""]
    for module, names in ((skyrl.api, skyrl.api.__all__), (skyrl.tinker, ["service_client"])):
        lines += [f"## {module.__name__}", "", _text(module), ""]
        for name in names:
            lines += _entry(module, name)
    return "\n".join(lines)


def _entry(module: ModuleType, name: str) -> list[str]:
    thing: Any = getattr(module, name)
    lines = [f"### {name}", ""]
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        return [*lines, f"`{name} = {str(thing).replace('typing.', '')}`", ""]
    with_arguments = inspect.isfunction(thing) or dataclasses.is_dataclass(thing)
    signature = f"{name}{inspect.signature(thing)}" if with_arguments else f"class {name}"
    lines += ["```python signatures", _plain(signature), "```", "", *_text(thing).splitlines(), ""]
    if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
        for method, member in vars(thing).items():
            of = inspect.unwrap(getattr(member, "__func__", member))
            if not method.startswith("_") and inspect.isfunction(of):
                lines += [f"**`{method}{_plain(str(inspect.signature(of)))}`**", "", *_text(of).splitlines(), ""]
    return lines


def _plain(signature: str) -> str:
    """Without the quotes that annotations of `from __future__ import annotations` have."""
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", signature.replace("typing.", ""))


def _text(thing: Any) -> str:
    """The docstring: code in a fence, and what looks like HTML made harmless outside of it."""
    parts = re.split(r"((?:^    .*\n?)+)", inspect.getdoc(thing) or "", flags=re.M)
    for at, part in enumerate(parts):
        code = textwrap.dedent(part).rstrip()
        parts[at] = f"```python needs=network\n{code}\n```\n" if at % 2 else html.escape(part, quote=False)
    return "".join(parts)


def examples_markdown() -> str:
    """All files of examples/ on one page."""
    page = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    page = re.sub(r"\[([\w.]+)\]\(\1\)", lambda m: f"[{m[1]}](#{m[1].replace('.', '').lower()})", page)
    page = page.replace("([data/](data))", "(`examples/data/`)")
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix in (".py", ".sh"):
            kind = {".py": "python", ".sh": "bash"}[path.suffix]
            page += f"\n## {path.name}\n\n```{kind}\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"
        elif path.suffix == ".ipynb":
            page += f"\n## {path.name}\n\n" + _notebook(json.loads(path.read_text(encoding="utf-8"))["cells"])
    return page


def _notebook(cells: list[dict[str, Any]]) -> str:
    """A notebook's text, code and printed outputs, one level of headings lower."""
    parts = []
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            parts.append(f"```python\n{text}\n```\n")
            printed = "".join("".join(one.get("text", ())) for one in cell["outputs"]).rstrip()
            parts += [f"```text\n{printed}\n```\n"] if printed else []
        else:
            parts.append(re.sub(r"\[([^\]]+)\]\((?:\.\./docs/)?([\w.]+)\)", _link, re.sub("^# ", "### ", text)) + "\n")
    return "\n".join(parts)


def _link(found: re.Match[str]) -> str:
    """A link of examples/ on the page that holds all of them."""
    target = found[2] if found[2].endswith(".md") else "#" + found[2].replace(".", "").lower()
    return f"[{found[1]}]({target})"


def gather() -> dict[str, str]:
    """{name: markdown} of every page. Links that leave docs/ become plain names, as the site holds only its pages."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
    for name, text in pages.items():
        text = re.sub(
            r"\[([^\]]+)\]\(\.\./examples/([\w.]+)\)",
            lambda m: f"[{m[1]}](examples.md#{m[2].replace('.', '').lower()})",
            text,
        )
        text = re.sub(r"^```(\w+) (?:needs=(\S+)|signatures)$", _fence, text, flags=re.M)
        pages[name] = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"`\1`", text)
    return {**pages, "examples.md": examples_markdown()}


def _fence(found: re.Match[str]) -> str:
    """A fence that the builder reads: what a block needs is its title."""
    return f"```{found[1]}" + (f' title="needs: {found[2].replace(",", ", ")}"' if found[2] else "")


def main() -> None:
    """Builds the site; ends with the builder's status when a link leads nowhere."""
    if "--api" in sys.argv:
        print(api_markdown(), end="")
        return
    builder = shutil.which("zensical", path=Path(sys.executable).parent)
    if builder is None:
        sys.exit("skyrl: error: the builder of the site is not installed; `make docs` installs it and builds")
    shutil.rmtree(PAGES, ignore_errors=True)
    PAGES.mkdir(parents=True)
    pages = gather()
    for name, text in pages.items():
        (PAGES / name).write_text(text, encoding="utf-8")
    shutil.copytree(ROOT / "docs" / "images", PAGES / "images", dirs_exist_ok=True)
    if code := subprocess.run([builder, "build", "--strict", "--clean"], cwd=ROOT).returncode:
        sys.exit(code)
    listed = [
        "# skyrl",
        "",
        "> Reinforcement learning for language models in one program: no Ray, no controller.",
        "",
        "## Pages",
        "",
    ]
    nav = (ROOT / "zensical.toml").read_text(encoding="utf-8")  # in which the first hour comes first and the log last
    for name, text in sorted(pages.items(), key=lambda page: nav.find(f'"{page[0]}"')):
        (SITE / name).write_text(text, encoding="utf-8")
        listed.append(f"- [{text.partition(chr(10))[0].lstrip('# ')}]({name})")
    (SITE / "llms.txt").write_text("\n".join(listed) + "\n", encoding="utf-8")
    print(f"{SITE / 'index.html'}: {len(pages)} pages")


if __name__ == "__main__":
    main()
